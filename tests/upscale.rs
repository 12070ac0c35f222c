//! `tadsr-train upscale` from the command line.
#![cfg(all(feature = "train", feature = "video"))]

#[path = "support/ffprobe.rs"]
mod ffprobe;
#[path = "support/tool.rs"]
mod tool;

use std::{
    fs,
    path::{Path, PathBuf},
};

use assert_cmd::Command;
use candle_core::{Tensor, safetensors};
use gst::prelude::*;
use image::{DynamicImage, ImageBuffer, Rgb, RgbImage, RgbaImage};
use tadsr::{
    Device, Upscaler, diffusion,
    frame::{Frame, PixelFormat},
    ladder,
    model::ResShiftModel,
    nn::resshift::upsample_bicubic,
    video::{Reader, TimedFrame},
};

use ffprobe::ffprobe;
use tool::Folder;

impl Folder {
    /// Makes a clip of 64x48 at 25 frames per second with a tone of the same length.
    fn clip(&self, name: &str, frames: u32) -> PathBuf {
        self.clip_like(name, frames, "format=I420,width=64,height=48", "x264enc")
    }

    fn clip_like(&self, name: &str, frames: u32, caps: &str, encoder: &str) -> PathBuf {
        gst::init().unwrap();
        let path = self.path(name);
        let line = format!(
            "videotestsrc num-buffers={frames} pattern=ball ! video/x-raw,framerate=25/1,{caps} ! {encoder} ! queue ! \
             mux. audiotestsrc num-buffers={} samplesperbuffer=960 ! audio/x-raw,rate=48000 ! avenc_aac ! queue ! mux. \
             {} name=mux ! filesink location={}",
            2 * frames,
            if name.ends_with("mkv") {
                "matroskamux"
            } else {
                "mp4mux"
            },
            path.display()
        );
        let pipeline = gst::parse::launch(&line).unwrap();
        pipeline.set_state(gst::State::Playing).unwrap();
        let types = [gst::MessageType::Eos, gst::MessageType::Error];
        let bus = pipeline.bus().unwrap();
        let end = bus.timed_pop_filtered(gst::ClockTime::from_seconds(120), &types);
        pipeline.set_state(gst::State::Null).unwrap();
        assert_eq!(end.unwrap().type_(), gst::MessageType::Eos, "{line}");
        path
    }
}

fn scene(width: u32, height: u32) -> RgbImage {
    RgbImage::from_fn(width, height, |x, y| {
        let bars = if (x / 5 + y / 7) % 2 == 0 { 60 } else { 180 };
        Rgb([bars, (x * 3 % 256) as u8, (y * 5 % 256) as u8])
    })
}

fn frames(path: &Path) -> Vec<TimedFrame> {
    Reader::open(path).unwrap().map(|f| f.unwrap()).collect()
}

fn size(path: &Path) -> (u32, u32) {
    image::image_dimensions(path).unwrap()
}

#[test]
fn a_picture_becomes_what_the_library_makes_of_it() {
    let folder = Folder::new();
    scene(33, 21).save(folder.path("a.png")).unwrap();
    let said = folder.succeeds(&["a.png", "b.png", "--scale", "2"]);
    assert!(said.contains("b.png: 66x42"), "{said}");
    let frame = Frame::from_rgb8(33, 21, scene(33, 21).as_raw()).unwrap();
    let info = frame.info();
    let largest = ladder::largest(info, &info.with_size(66, 42)).unwrap();
    let mut upscaler = Upscaler::load(largest, Device::Auto).unwrap();
    let expected = upscaler.upscale(&frame).unwrap();
    let made = image::open(folder.path("b.png")).unwrap().into_rgb8();
    assert_eq!(made.as_raw(), expected.plane(0));

    folder.succeeds(&[
        "a.png",
        "c.jpg",
        "--scale",
        "1.5",
        "--strength",
        "0.5",
        "--threads",
        "1",
    ]);
    assert_eq!(size(&folder.path("c.jpg")), (50, 32));
    fs::create_dir(folder.path("out")).unwrap();
    folder.succeeds(&["a.png", "out", "--model", "tiny-x4", "--scale", "4"]);
    assert_eq!(size(&folder.path("out/a.png")), (132, 84));
    assert_eq!(folder.files("out"), ["a.png"]);
}

#[test]
fn alpha_grey_and_16_bits_are_kept_in_png_and_said_to_be_lost_in_jpeg() {
    let folder = Folder::new();
    let alpha = RgbaImage::from_fn(20, 16, |x, _| image::Rgba([200, 90, 30, (x * 12) as u8]));
    alpha.save(folder.path("alpha.png")).unwrap();
    let grey = DynamicImage::ImageRgb8(scene(20, 16)).into_luma8();
    grey.save(folder.path("grey.png")).unwrap();
    // A ramp of fewer than 256 levels in 8 bits.
    let deep = ImageBuffer::from_fn(64, 16, |x, _| Rgb([12_345_u16, 20_000 + 7 * x as u16, 0]));
    deep.save(folder.path("deep.png")).unwrap();

    folder.succeeds(&["alpha.png", "alpha2.png"]);
    let large = image::open(folder.path("alpha2.png")).unwrap();
    let large = large.as_rgba8().expect("alpha");
    assert!(large.get_pixel(2, 5)[3] < 30 && large.get_pixel(37, 5)[3] > 200);
    folder.succeeds(&["grey.png", "grey2.png"]);
    assert!(
        image::open(folder.path("grey2.png"))
            .unwrap()
            .as_luma8()
            .is_some()
    );
    let said = folder.succeeds(&["deep.png", "deep2.png", "--strength", "0"]);
    assert!(!said.contains("bits"), "{said}");
    let large = image::open(folder.path("deep2.png")).unwrap();
    let large = large.as_rgb16().expect("16 bits and no alpha");
    for (x, _, &Rgb([r, g, b])) in large.enumerate_pixels() {
        let ramp = 20_000.0 + 7.0 * (f64::from(x) - 0.5) / 2.0;
        assert!(r.abs_diff(12_345) <= 4 && b <= 4, "{r} {b}");
        // The interpolation is no straight line, and the edges repeat.
        let inside = (4..124).contains(&x);
        assert!(
            !inside || (f64::from(g) - ramp).abs() <= 6.0,
            "{x}: {g} {ramp}"
        );
    }
    let said = folder.succeeds(&["deep.png", "deep.jpg"]);
    assert!(said.contains("16 bits"), "{said}");
    let said = folder.succeeds(&["alpha.png", "alpha.jpg"]);
    assert!(said.contains("alpha"), "{said}");
}

#[test]
fn a_folder_keeps_names_and_places_and_goes_on_after_a_bad_file() {
    let folder = Folder::new();
    for name in ["in/a.png", "in/deep/b.jpg", "in/deep/er/c.PNG"] {
        fs::create_dir_all(folder.path(name).parent().unwrap()).unwrap();
        scene(24, 16).save(folder.path(name)).unwrap();
    }
    fs::write(folder.path("in/broken.png"), "no picture").unwrap();
    fs::write(folder.path("in/notes.txt"), "no picture").unwrap();
    fs::write(folder.path("in/.hidden.png"), "no picture").unwrap();
    let whole = fs::read(folder.path("in/deep/b.jpg")).unwrap();
    fs::write(folder.path("in/cut.jpg"), &whole[..whole.len() / 2]).unwrap();

    let said = folder.fails(&["in", "out"]);
    assert!(said.contains("skipped 'in/notes.txt'"), "{said}");
    assert!(said.contains("2 pictures could not be upscaled"), "{said}");
    assert!(said.contains("in/broken.png': no PNG, JPEG"), "{said}");
    assert!(said.contains("in/cut.jpg': the file ends"), "{said}");
    let made = ["a.png", "deep/b.jpg", "deep/er/c.PNG"];
    assert_eq!(folder.files("out"), made);
    assert_eq!(size(&folder.path("out/deep/b.jpg")), (48, 32));

    let said = folder.fails(&["in", "out"]);
    assert!(said.contains("out/a.png' exists"), "{said}");
    fs::remove_file(folder.path("in/broken.png")).unwrap();
    fs::remove_file(folder.path("in/cut.jpg")).unwrap();
    fs::remove_file(folder.path("out/a.png")).unwrap();
    let said = folder.succeeds(&["in", "out", "--skip-existing"]);
    assert!(
        said.contains("1 of 3 pictures") && said.contains("2 were there"),
        "{said}"
    );
    folder.succeeds(&["in", "out", "--overwrite"]);
    // An output folder inside the input is not part of the input.
    folder.succeeds(&["in", "in/large"]);
    folder.succeeds(&["in", "in/large", "--overwrite"]);
    assert_eq!(folder.files("in/large"), made);
}

#[test]
fn a_video_keeps_frames_times_and_audio() {
    let folder = Folder::new();
    let from = folder.clip("a.mp4", 30);
    for name in ["b.mp4", "b.mkv"] {
        let said = folder.succeeds(&["a.mp4", name, "--scale", "2"]);
        assert!(
            said.contains("30 frames, 64x48 to 128x96") && said.contains("AAC copied"),
            "{said}"
        );
        let reader = Reader::open(&folder.path(name)).unwrap();
        assert_eq!(reader.audio_streams(), 1);
        assert_eq!(reader.stream().framerate(), Some((25, 1)));
        let made: Vec<_> = reader.map(|f| f.unwrap()).collect();
        let times =
            |frames: &[TimedFrame]| frames.iter().map(|f| f.pts.as_millis()).collect::<Vec<_>>();
        assert_eq!(times(&made), times(&frames(&from)), "{name}");
        assert_eq!(
            (made[0].frame.info().width, made[0].frame.info().height),
            (128, 96)
        );
    }
    let said = folder.succeeds(&[
        "a.mp4",
        "c.mp4",
        "--no-audio",
        "--encoder",
        "x265enc speed-preset=ultrafast",
    ]);
    assert!(said.contains("audio: none"), "{said}");
    assert_eq!(
        Reader::open(&folder.path("c.mp4")).unwrap().audio_streams(),
        0
    );
    assert!(!folder.path("c.partial.mp4").exists());
}

#[test]
fn the_model_that_is_chosen_for_a_video_is_told() {
    let folder = Folder::new();
    folder.clip("a.mp4", 3);
    let said = folder.succeeds(&["a.mp4", "auto.mp4", "--scale", "2"]);
    let told = said.lines().find(|line| line.contains("model")).unwrap();
    let model = told.rsplit_once("model ").unwrap().1;
    let again = folder.succeeds(&["a.mp4", "named.mp4", "--scale", "2", "--model", model]);
    assert!(!again.contains("model"), "{again}");
    let pixels = |name: &str| {
        let frames = frames(&folder.path(name));
        let planes = frames.iter().map(|f| f.frame.plane(0).to_vec());
        planes.collect::<Vec<_>>()
    };
    assert_eq!(pixels("auto.mp4"), pixels("named.mp4"), "{told}");
}

#[test]
fn videos_of_odd_sizes_become_even_and_deep_ones_stay_deep() {
    let folder = Folder::new();
    folder.clip_like("odd.mkv", 5, "format=Y444,width=33,height=17", "x264enc");
    let said = folder.succeeds(&["odd.mkv", "even.mp4", "--scale", "1.5"]);
    assert!(said.contains("33x17 to 50x26"), "{said}");
    folder.clip_like(
        "deep.mkv",
        5,
        "format=I420_10LE,width=32,height=32",
        "x264enc",
    );
    folder.succeeds(&["deep.mkv", "deep.mp4"]);
    let info = *Reader::open(&folder.path("deep.mp4"))
        .unwrap()
        .stream()
        .frame();
    assert_eq!((info.format, info.width), (PixelFormat::I420_10Le, 64));
}

#[test]
fn a_damaged_video_gives_what_is_there_and_says_so() {
    let folder = Folder::new();
    let path = folder.clip("a.mkv", 150);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let (_, out, err) = folder.upscale(&["a.mkv", "b.mkv", "--strength", "0"]);
    assert!(
        err.contains("a.mkv") && err.contains("cut off"),
        "{out} {err}"
    );
    let all = frames(&folder.path("b.mkv")).len();
    assert!((40..120).contains(&all), "{all} frames");
    fs::write(folder.path("c.mp4"), &bytes[..60]).unwrap();
    let said = folder.fails(&["c.mp4", "d.mp4"]);
    assert!(said.contains("c.mp4"), "{said}");
    assert!(!folder.path("d.mp4").exists() && !folder.path("d.partial.mp4").exists());
}

#[test]
fn a_decoder_that_crashes_is_an_error_of_that_file() {
    let folder = Folder::new();
    let args = "-v error -f lavfi -i testsrc2=s=64x48:r=25:d=1 -c:v ffv1 -pix_fmt gray10le a.mkv";
    let made = std::process::Command::new("ffmpeg")
        .current_dir(folder.0.path())
        .args(args.split(' '))
        .status();
    assert!(made.expect("ffmpeg is installed").success());
    let (success, _, err) = folder.upscale(&["a.mkv", "b.mkv", "--strength", "0"]);
    // Later versions of GStreamer know the format.
    if success {
        assert_eq!(frames(&folder.path("b.mkv")).len(), 25);
    } else {
        assert!(err.contains("a.mkv") && err.contains("crashes"), "{err}");
    }
}

#[test]
fn a_picture_keeps_its_metadata_and_is_upscaled_whatever_follows_it() {
    let folder = Folder::new();
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 8, 6);
    encoder.set_source_gamma(png::ScaledFloat::from_scaled(100_000));
    encoder.set_pixel_dims(Some(png::PixelDimensions {
        xppu: 11_811,
        yppu: 11_811,
        unit: png::Unit::Meter,
    }));
    encoder
        .add_text_chunk("Title".into(), "A scene".into())
        .unwrap();
    encoder
        .write_header()
        .unwrap()
        .write_image_data(&[90; 48])
        .unwrap();
    fs::write(folder.path("a.png"), &file).unwrap();
    folder.succeeds(&["a.png", "b.png", "--scale", "2"]);
    let bytes = fs::read(folder.path("b.png")).unwrap();
    let reader = png::Decoder::new(std::io::Cursor::new(bytes))
        .read_info()
        .unwrap();
    let info = reader.info();
    assert_eq!((info.width, info.height), (16, 12));
    assert_eq!(
        info.gama_chunk.map(png::ScaledFloat::into_scaled),
        Some(100_000)
    );
    assert_eq!(info.pixel_dims.map(|d| d.xppu), Some(11_811));
    assert_eq!(info.uncompressed_latin1_text[0].text, "A scene");

    // A film after the picture contains the markers of further pictures.
    RgbImage::from_pixel(16, 8, Rgb([10, 200, 30]))
        .save(folder.path("c.jpg"))
        .unwrap();
    let mut bytes = fs::read(folder.path("c.jpg")).unwrap();
    bytes.extend([0xFF, 0xDA, 1, 2, 3, 0xFF, 0xD9, 0xFF, 0xDA, 0, 0]);
    fs::write(folder.path("c.jpg"), &bytes).unwrap();
    folder.succeeds(&["c.jpg", "d.jpg", "--scale", "2"]);
    fs::write(folder.path("e.jpg"), &bytes[..bytes.len() - 60]).unwrap();
    assert!(folder.fails(&["e.jpg", "f.jpg"]).contains("middle"));
}

#[test]
fn animations_are_refused_at_once() {
    let folder = Folder::new();
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 4, 4);
    encoder.set_animated(3, 0).unwrap();
    let mut writer = encoder.write_header().unwrap();
    (0..3).for_each(|_| writer.write_image_data(&[90; 16]).unwrap());
    drop(writer);
    fs::write(folder.path("a.png"), &file).unwrap();
    assert!(folder.fails(&["a.png", "b.png"]).contains("3 pictures"));
    fs::write(folder.path("a.gif"), b"GIF89a\x04\0\x04\0\0\0\0;").unwrap();
    assert!(folder.fails(&["a.gif", "b.mp4"]).contains("GIF"));
}

#[test]
fn colours_of_transparent_pixels_do_not_show_at_edges() {
    let folder = Folder::new();
    let disk = RgbaImage::from_fn(32, 32, |x, y| {
        let inside = (x as f32 - 15.5).hypot(y as f32 - 15.5) < 10.0;
        image::Rgba(if inside { [255; 4] } else { [0; 4] })
    });
    disk.save(folder.path("a.png")).unwrap();
    folder.succeeds(&["a.png", "b.png", "--scale", "3"]);
    let large = image::open(folder.path("b.png")).unwrap().into_rgba8();
    for pixel in large.pixels() {
        let [red, green, blue, alpha] = pixel.0.map(f32::from);
        // The white disk is invisible on white.
        let darkest = red.min(green).min(blue);
        let on_white = 255.0 - alpha / 255.0 * (255.0 - darkest);
        assert!(on_white >= 253.0, "{pixel:?}");
    }
}

#[test]
fn a_missing_decoder_is_named() {
    let folder = Folder::new();
    folder.clip("a.mp4", 5);
    let ranks = "avdec_h264:NONE,openh264dec:NONE,vah264dec:NONE,nvh264dec:NONE,v4l2h264dec:NONE,vaapih264dec:NONE,\
                 vulkanh264dec:NONE,v4l2slh264dec:NONE,msdkh264dec:NONE,qsvh264dec:NONE";
    let (success, _, err) =
        folder.upscale_with(&["a.mp4", "b.mp4"], &[("GST_PLUGIN_FEATURE_RANK", ranks)]);
    assert!(
        !success && err.contains("H.264") && err.contains("install"),
        "{err}"
    );
}

#[test]
fn what_cannot_be_done_is_refused_with_a_reason() {
    let folder = Folder::new();
    scene(16, 16).save(folder.path("a.png")).unwrap();
    scene(16, 16).save(folder.path("b.png")).unwrap();
    fs::create_dir(folder.path("in")).unwrap();
    folder.clip("v.mp4", 5);
    fs::write(folder.path("empty.png"), "").unwrap();
    for (args, reason) in [
        (&["empty.png", "c.png"][..], "'empty.png' is empty"),
        (&["a.png", "b.png"], "'b.png' exists; --overwrite"),
        (&["a.png", "a.png", "--overwrite"], "is the input"),
        (&["a.png", "c.bmp"], ".png, .jpg or .jpeg"),
        (&["nowhere.png", "c.png"], "nowhere.png"),
        (&["a.png", "no/c.png"], "no/c.png"),
        (&["a.png", "c.png", "--scale", "5"], "scale 5"),
        (&["a.png", "c.png", "--model", "nosuch"], "nosuch"),
        (&["a.png", "c.png", "--device", "cuda"], "cuda"),
        (
            &["a.png", "c.png", "--encoder", "x264enc"],
            "--encoder is for videos",
        ),
        (&["in", "out"], "no picture"),
        (&["in", "b.png"], "exists and is none"),
        (&["v.mp4", "c.png"], "is no PNG, JPEG, WebP or TIFF picture"),
        (&["v.mp4", "c.avi"], ".mkv or .webm"),
        (&["v.mp4", "no/c.mp4"], "there is no folder 'no'"),
        (
            &["v.mp4", "c.mp4", "--quality", "90"],
            "--quality is for pictures",
        ),
        (&["v.mp4", "c.mp4", "--encoder", "nosuchenc"], "nosuchenc"),
        (&["a.png", "c.png", "--strength", "2"], "0 to 1"),
    ] {
        let said = folder.fails(args);
        assert!(said.contains(reason), "{args:?}: {said}");
    }
    assert_eq!(folder.files("."), ["a.png", "b.png", "empty.png", "v.mp4"]);
    folder.succeeds(&["a.png", "b.png", "--overwrite"]);
    assert_eq!(size(&folder.path("b.png")), (32, 32));
}

#[test]
fn options_that_a_lite_model_does_not_have_are_refused_by_name() {
    let folder = Folder::new();
    scene(16, 16).save(folder.path("a.png")).unwrap();
    for (option, setting) in [
        (["--steps", "15"], "steps"),
        (["--seed", "1"], "seed"),
        (["--noise", "0.5"], "noise"),
        (["--tile", "64"], "tile size"),
        (["--tile-overlap", "8"], "tile overlap"),
        (["--color-fix", "none"], "colour fix"),
        (["--noise-file", "n.safetensors"], "noise field"),
        (["--save-noise", "n.safetensors"], "noise field"),
    ] {
        let said = folder.fails(&[&["a.png", "b.png"][..], &option].concat());
        let reason = format!("model 'tiny-x4' has no setting '{setting}'");
        assert!(said.contains(&reason), "{option:?}: {said}");
    }
    assert!(!folder.path("b.png").exists());
}

#[test]
fn the_unfinished_file_replaces_neither_the_input_nor_another_unasked() {
    let folder = Folder::new();
    let input = folder.clip("film.partial.mp4", 5);
    fs::copy(&input, folder.path("a.mp4")).unwrap();
    let before = fs::read(&input).unwrap();
    for args in [
        &["film.partial.mp4", "film.mp4"][..],
        &["film.partial.mp4", "film.mp4", "--overwrite"],
        &["a.mp4", "film.mp4"],
    ] {
        let said = folder.fails(args);
        assert!(said.contains("until it is complete"), "{said}");
        assert_eq!(fs::read(&input).unwrap(), before);
    }
    folder.succeeds(&["a.mp4", "film.mp4", "--overwrite"]);
    assert_eq!(folder.files("."), ["a.mp4", "film.mp4"]);
    // The partial file is a hard link to the input.
    fs::hard_link(folder.path("a.mp4"), folder.path("b.partial.mp4")).unwrap();
    folder.succeeds(&["a.mp4", "b.mp4", "--overwrite"]);
    assert_eq!(fs::read(folder.path("a.mp4")).unwrap(), before);
}

#[test]
fn a_header_that_claims_too_many_pixels_is_an_error_that_names_the_file() {
    let folder = Folder::new();
    scene(8, 8).save(folder.path("a.png")).unwrap();
    let mut bytes = fs::read(folder.path("a.png")).unwrap();
    let side = 400_000_u32.to_be_bytes();
    bytes[16..20].copy_from_slice(&side);
    bytes[20..24].copy_from_slice(&side);
    let crc = bytes[12..29].iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| {
            (c >> 1) ^ (0xEDB8_8320 * (c & 1))
        })
    });
    bytes[29..33].copy_from_slice(&(!crc).to_be_bytes());
    fs::write(folder.path("huge.png"), bytes).unwrap();
    let said = folder.fails(&["huge.png", "b.png"]);
    assert!(
        said.contains("huge.png") && said.contains("400000x400000 pixels are too many"),
        "{said}"
    );
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_instead_of_waited_for() {
    let folder = Folder::new();
    fs::create_dir(folder.path("in")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(folder.path("in/a.png"))
        .status();
    assert!(made.unwrap().success());
    for args in [&["in/a.png", "b.png"][..], &["in", "out"]] {
        let said = folder.fails(args);
        assert!(
            said.contains("in/a.png") && said.contains("regular file"),
            "{said}"
        );
    }
}

/// Ctrl-C during the work completes the partial file so that it plays.
#[cfg(unix)]
#[test]
fn a_video_that_is_stopped_is_left_playable_under_another_name() {
    use std::{process::Stdio, thread, time::Duration};
    let folder = Folder::new();
    folder.clip_like("a.mp4", 600, "format=I420,width=160,height=120", "x264enc");
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("tadsr-train"))
        .current_dir(folder.0.path())
        .args(["upscale", "a.mp4", "b.mp4"])
        .stderr(fs::File::create(folder.path("stderr")).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let partial = folder.path("b.partial.mp4");
    while !partial.metadata().is_ok_and(|m| m.len() > 2_000) {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        thread::sleep(Duration::from_millis(20));
    }
    let interrupt = std::process::Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(interrupt.unwrap().success());
    assert!(!child.wait().unwrap().success());
    assert!(!folder.path("b.mp4").exists());
    let made = frames(&partial).len();
    assert!((1..600).contains(&made), "{made} frames");
    let said = fs::read_to_string(folder.path("stderr")).unwrap();
    assert!(!said.contains("CRITICAL"), "{said}");
}

/// Returns the folder with reference values of the ResShift networks.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures/mini")
}

/// Returns the ResShift networks' image for `lq` and `noise`, both [1, 3, 16, 16], as rows of R, G,
/// B from 0 to 1.
fn reference(model: &Path, lq: &Tensor, noise: &Tensor) -> Vec<f32> {
    let model = ResShiftModel::read(model).unwrap();
    let (unet, autoencoder) = (
        model.unet(&candle_core::Device::Cpu).unwrap(),
        model.autoencoder(&candle_core::Device::Cpu).unwrap(),
    );
    let schedule = model.schedule().unwrap();
    let nhwc = |t: &Tensor| t.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
    let (lq, noise) = (nhwc(lq), nhwc(noise));
    let z_y = autoencoder
        .encode(&upsample_bicubic(&lq, 4).unwrap())
        .unwrap();
    let z_t = schedule.prior(&z_y, &noise).unwrap();
    let denoise = |z: &Tensor, t: usize| unet.forward(z, &[t], Some(&lq));
    let z0 = diffusion::one_step(&schedule, &z_t, denoise).unwrap();
    let image = autoencoder.decode(&z0, true).unwrap();
    let values = image.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values
        .iter()
        .map(|v| ((v + 1.0) / 2.0).clamp(0.0, 1.0))
        .collect()
}

#[test]
#[ignore = "needs the reference values in ../shared"]
fn a_resshift_model_gives_the_published_image_for_given_noise() {
    let fixtures = fixtures();
    let folder = Folder::new();
    let path = |name: &str| fixtures.join(name).to_str().unwrap().to_owned();
    let import = Command::cargo_bin("tadsr-train")
        .unwrap()
        .current_dir(folder.0.path())
        .args([
            "import",
            "--unet",
            &path("unet.pth"),
            "--autoencoder",
            &path("autoencoder.pth"),
        ])
        .args(["-o", "mini.safetensors"])
        .output()
        .unwrap();
    assert!(import.status.success(), "{import:?}");

    // The input as in a picture file, rounded to 8 bits. The fixture has the networks' result for
    // the exact input.
    let tensors =
        safetensors::load(fixtures.join("io.safetensors"), &candle_core::Device::Cpu).unwrap();
    let (lq, noise) = (&tensors["lq"], &tensors["noise"]);
    let model = folder.path("mini.safetensors");
    let exact = tensors["image"]
        .permute((0, 2, 3, 1))
        .unwrap()
        .flatten_all()
        .unwrap();
    let exact = exact.to_vec1::<f32>().unwrap();
    for (made, exact) in reference(&model, lq, noise).iter().zip(exact) {
        assert!((made - ((exact + 1.0) / 2.0).clamp(0.0, 1.0)).abs() < 1e-3);
    }
    let rounded = ((lq + 1.0).unwrap() * 127.5).unwrap().round().unwrap();
    let bytes = rounded
        .permute((0, 2, 3, 1))
        .unwrap()
        .flatten_all()
        .unwrap();
    let bytes: Vec<u8> = bytes
        .to_vec1::<f32>()
        .unwrap()
        .iter()
        .map(|v| *v as u8)
        .collect();
    RgbImage::from_raw(16, 16, bytes)
        .unwrap()
        .save(folder.path("lq.png"))
        .unwrap();
    let lq = ((rounded / 127.5).unwrap() - 1.0).unwrap();
    let expected = reference(&model, &lq, noise);

    safetensors::save(
        &[("noise", noise.clone())].into(),
        folder.path("noise.safetensors"),
    )
    .unwrap();
    let plain = ["--model", "mini.safetensors", "--color-fix", "none"];
    let given = [
        "--noise-file",
        "noise.safetensors",
        "--save-noise",
        "used.safetensors",
    ];
    folder.succeeds(&[&["lq.png", "out.png"], &plain[..], &given].concat());
    let made = image::open(folder.path("out.png")).unwrap().into_rgb8();
    assert_eq!(made.dimensions(), (64, 64));
    for (made, expected) in made.as_raw().iter().zip(&expected) {
        let difference = f32::from(*made) / 255.0 - expected;
        assert!(
            difference.abs() < 0.5 / 255.0 + 1e-3,
            "{made} for {}",
            expected * 255.0
        );
    }
    let used =
        safetensors::load(folder.path("used.safetensors"), &candle_core::Device::Cpu).unwrap();
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(values(&used["noise"]), values(noise));

    // Every option reaches the model: another seed makes other noise, and more steps make another
    // picture.
    let read = |name: &str| image::open(folder.path(name)).unwrap().into_rgb8();
    folder.succeeds(
        &[
            &[
                "lq.png",
                "seed.png",
                "--seed",
                "3",
                "--save-noise",
                "seed.safetensors",
            ],
            &plain[..],
        ]
        .concat(),
    );
    folder.succeeds(
        &[
            &["lq.png", "again.png", "--noise-file", "seed.safetensors"],
            &plain[..],
        ]
        .concat(),
    );
    assert_eq!(read("seed.png"), read("again.png"));
    assert_ne!(read("seed.png"), made);
    let steps = ["--noise-file", "noise.safetensors", "--steps", "15"];
    folder.succeeds(&[&["lq.png", "steps.png"], &plain[..], &steps].concat());
    assert_ne!(read("steps.png"), made);
    let said = folder.fails(&[&["lq.png", "n.png", "--steps", "99"], &plain[..]].concat());
    assert!(said.contains("99"), "{said}");
    scene(80, 16).save(folder.path("wide.png")).unwrap();
    let said = folder.fails(&[&["wide.png", "n.png"], &plain[..], &given[..2]].concat());
    assert!(said.contains("wide.png"), "{said}");
    folder.succeeds(
        &[
            &[
                "wide.png",
                "tiles.png",
                "--tile",
                "64",
                "--tile-overlap",
                "16",
                "--noise",
                "0.5",
            ],
            &plain[..2],
        ]
        .concat(),
    );
    assert_eq!(read("tiles.png").dimensions(), (320, 64));
}

/// Returns width, height and sample aspect ratio of a video.
fn probed_shape(path: &Path) -> String {
    let entries = "stream=width,height,sample_aspect_ratio";
    let text = ffprobe(path, &["-select_streams", "v:0", "-show_entries", entries]);
    text.trim().trim_matches(',').into()
}

#[test]
fn a_width_or_height_gives_exactly_that_size_and_keeps_the_shape() {
    let folder = Folder::new();
    scene(33, 21).save(folder.path("a.png")).unwrap();
    for (args, expected) in [
        (&["--width", "70"][..], (70, 45)),
        (&["--height", "63"], (99, 63)),
        (&["--width", "33"], (33, 21)),
        (&["--width", "132"], (132, 84)),
    ] {
        folder.succeeds(&[&["a.png", "b.png", "--overwrite"], args].concat());
        assert_eq!(size(&folder.path("b.png")), expected, "{args:?}");
        let bytes = fs::read(folder.path("b.png")).unwrap();
        let reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info();
        assert!(reader.unwrap().info().pixel_dims.is_none(), "{args:?}");
    }

    // Another shape stretches the pixels, and the file says so.
    let both = ["--width", "66", "--height", "63"];
    for name in ["c.png", "c.jpg"] {
        folder.succeeds(&[&["a.png", name], &both[..]].concat());
        assert_eq!(size(&folder.path(name)), (66, 63));
    }
    let bytes = fs::read(folder.path("c.png")).unwrap();
    let reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info();
    let density = reader.unwrap().info().pixel_dims.unwrap();
    // A pixel is half as wide again as it is high.
    assert_eq!((density.xppu, density.yppu), (2, 3));
    assert_eq!(density.unit, png::Unit::Unspecified);
    let bytes = fs::read(folder.path("c.jpg")).unwrap();
    assert_eq!(bytes[13..18], [0, 0, 2, 0, 3]);

    for name in ["in/a.png", "in/b/c.png"] {
        fs::create_dir_all(folder.path(name).parent().unwrap()).unwrap();
    }
    scene(40, 20).save(folder.path("in/a.png")).unwrap();
    scene(30, 30).save(folder.path("in/b/c.png")).unwrap();
    folder.succeeds(&["in", "out", "--height", "60"]);
    assert_eq!(size(&folder.path("out/a.png")), (120, 60));
    assert_eq!(size(&folder.path("out/b/c.png")), (60, 60));
    scene(100, 20).save(folder.path("in/b/wide.png")).unwrap();
    let said = folder.fails(&["in", "out", "--height", "100", "--overwrite"]);
    assert!(
        said.contains("2 pictures could not be upscaled") && said.contains("heights of 20 to 80"),
        "{said}"
    );
}

#[test]
fn a_video_gets_the_size_asked_for_and_a_true_pixel_shape() {
    let folder = Folder::new();
    folder.clip("a.mp4", 5);
    let wide = "format=I420,width=72,height=48,pixel-aspect-ratio=(fraction)8/9";
    folder.clip_like("w.mp4", 5, wide, "x264enc");
    for (input, args, expected) in [
        ("a.mp4", &["--width", "150"][..], "150,112,1:1"),
        ("a.mp4", &["--height", "192"], "256,192,1:1"),
        ("a.mp4", &["--width", "128", "--height", "96"], "128,96,1:1"),
        (
            "a.mp4",
            &["--width", "128", "--height", "144"],
            "128,144,3:2",
        ),
        ("w.mp4", &["--width", "144"], "144,96,8:9"),
        ("w.mp4", &["--width", "128", "--height", "96"], "128,96,1:1"),
    ] {
        for name in ["b.mp4", "b.mkv"] {
            let said = folder.succeeds(&[&[input, name, "--overwrite"], args].concat());
            assert!(said.contains("5 frames"), "{said}");
            assert_eq!(
                probed_shape(&folder.path(name)),
                expected,
                "{input} {args:?}"
            );
        }
    }
}

#[test]
fn sizes_out_of_reach_are_refused_with_those_in_reach() {
    let folder = Folder::new();
    scene(33, 21).save(folder.path("a.png")).unwrap();
    folder.clip_like("v.mp4", 5, "format=Y444,width=33,height=21", "x264enc");
    for (args, reason) in [
        (
            &["a.png", "b.png", "--width", "32"][..],
            "widths of 33 to 132",
        ),
        (
            &["a.png", "b.png", "--width", "133"],
            "'tiny-x4' (scale 1 to 4)",
        ),
        (&["a.png", "b.png", "--height", "85"], "heights of 21 to 84"),
        (
            &["a.png", "b.png", "--width", "66", "--height", "20"],
            "--height 20 is out of range: from 33x21",
        ),
        (
            &["a.png", "b.png", "--width", "60", "--scale", "2"],
            "--scale",
        ),
        (
            &["a.png", "b.png", "--height", "60", "--scale", "2"],
            "--scale",
        ),
        (&["a.png", "b.png", "--width", "0"], "--width"),
        (
            &["a.png", "b.png", "--model", "tiny-x2", "--width", "67"],
            "'tiny-x2' (scale 1 to 2)",
        ),
        (&["v.mp4", "b.mp4", "--width", "133"], "widths of 34 to 132"),
        (&["v.mp4", "b.mp4", "--width", "65"], "such as 64 or 66"),
    ] {
        let said = folder.fails(args);
        assert!(said.contains(reason), "{args:?}: {said}");
    }
    assert_eq!(folder.files("."), ["a.png", "v.mp4"]);
}

/// Returns the times of the frames or packets of a stream, in order.
fn probed_times(path: &Path, stream: &str) -> Vec<f64> {
    let entries = [
        "-select_streams",
        stream,
        "-show_entries",
        "packet=pts_time",
    ];
    let text = ffprobe(path, &entries);
    let number = |line: &str| line.trim_matches(',').parse().ok();
    let mut times: Vec<f64> = text.lines().filter_map(number).collect();
    times.sort_by(f64::total_cmp);
    times
}

#[test]
fn a_part_of_a_video_has_its_frames_and_its_sound_in_sync() {
    let folder = Folder::new();
    // Clicks at each whole second show that sound and picture are in sync.
    let ffmpeg = |args: &str, name: &str| {
        let made = std::process::Command::new("ffmpeg")
            .current_dir(folder.0.path())
            .args(["-v", "error", "-y", "-f", "lavfi"])
            .args(["-i", "testsrc2=s=64x48:r=25:d=6", "-f", "lavfi"])
            .args([
                "-i",
                "aevalsrc=exprs='if(lt(mod(t,1),0.1),sin(2000*t),0)':s=48000:d=6",
            ])
            .args(args.split(' '))
            .arg(name)
            .status();
        assert!(made.expect("ffmpeg is installed").success(), "{args}");
    };
    ffmpeg("-c:v libx264 -g 30 -bf 3 -c:a aac", "a.mp4");
    ffmpeg("-c:v libx264 -g 250 -bf 3 -c:a libopus", "a.mkv");
    ffmpeg("-c:v mpeg2video -g 12 -c:a mp2", "a.ts");
    for (input, output) in [("a.mp4", "b.mkv"), ("a.mkv", "b.mp4"), ("a.ts", "b.mp4")] {
        for (start, length, frames, first) in [
            ("2", "1.5", 38, 0.0),
            ("00:00:01.990", "0.1", 3, 0.01),
            ("0", "2", 50, 0.0),
            ("4.5", "10", 37, 0.02),
        ] {
            let what = format!("{input} {start} {length}");
            let range = ["--start", start, "--duration", length];
            let args = [
                &[input, output, "--overwrite", "--strength", "0"],
                &range[..],
            ];
            let said = folder.succeeds(&args.concat());
            assert!(said.contains(&format!("{frames} frames")), "{what}: {said}");
            let path = folder.path(output);
            let video = probed_times(&path, "v:0");
            assert_eq!(video.len(), frames, "{what}");
            assert!((video[0] - first).abs() < 0.015, "{what}: {video:?}");
            let sound = probed_times(&path, "a:0");
            let length: f64 = length.parse::<f64>().unwrap().min(6.0 - start_of(start));
            let (begin, end) = (sound[0], sound[sound.len() - 1]);
            assert!((-0.06..0.06).contains(&begin), "{what}: {begin}");
            assert!((end - length).abs() < 0.08, "{what}: {end}");
        }
    }
    // The click at 3 s is 1 s after the start, in the sound and in the clock of the frames.
    folder.succeeds(&[
        "a.mp4",
        "c.mkv",
        "--start",
        "2",
        "--duration",
        "2.5",
        "--strength",
        "0",
    ]);
    let heard = clicks(&folder.path("c.mkv"));
    assert!(heard.iter().any(|t| (t - 1.0).abs() < 0.03), "{heard:?}");
    assert!(heard.iter().any(|t| (t - 2.0).abs() < 0.03), "{heard:?}");

    // Without a duration and without loss, the frames are those of the input.
    let same = ["--strength", "0", "--scale", "1", "--start", "5"];
    let lossless = ["--encoder", "x264enc pass=quant quantizer=0"];
    folder.succeeds(&[&["a.mp4", "d.mp4"], &same[..], &lossless].concat());
    let (all, part) = (frames(&folder.path("a.mp4")), frames(&folder.path("d.mp4")));
    assert_eq!(part.len(), 25);
    let distance = |a: &Frame, b: &Frame| {
        let pairs = a.plane(0).iter().zip(b.plane(0));
        pairs.map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.plane(0).len() as f64
    };
    let near = distance(&part[0].frame, &all[125].frame);
    let next = distance(&part[0].frame, &all[126].frame);
    assert!(near < next / 4.0, "{near} {next}");
}

/// Returns the seconds in a time of a command line.
fn start_of(text: &str) -> f64 {
    text.rsplit(':').next().unwrap().parse().unwrap()
}

/// Returns the times at which the sound of a file becomes loud after silence.
fn clicks(path: &Path) -> Vec<f64> {
    let output = std::process::Command::new("ffmpeg")
        .args(["-v", "error", "-i"])
        .arg(path)
        .args([
            "-af",
            "aresample=async=1:first_pts=0",
            "-ac",
            "1",
            "-ar",
            "8000",
        ])
        .args(["-f", "s16le", "-"])
        .output()
        .expect("ffmpeg is installed");
    let samples = output.stdout.chunks_exact(2);
    let samples = samples.map(|b| i16::from_le_bytes([b[0], b[1]]));
    let (mut found, mut loud) = (Vec::new(), -1.0);
    for (n, sample) in samples.enumerate() {
        let time = n as f64 / 8000.0;
        if sample.unsigned_abs() > 3000 {
            if time - loud > 0.3 {
                found.push(time);
            }
            loud = time;
        }
    }
    found
}

#[test]
fn parts_of_a_video_follow_each_other_without_gap_or_overlap() {
    let folder = Folder::new();
    folder.clip_like(
        "a.mp4",
        60,
        "format=I420,width=64,height=48",
        "x264enc key-int-max=25",
    );
    let mut all = Vec::new();
    for (start, name) in [("0", "0.mp4"), ("0.84", "1.mp4"), ("1.68", "2.mp4")] {
        let part = ["--start", start, "--duration", "0.84", "--strength", "0"];
        folder.succeeds(&[&["a.mp4", name], &part[..]].concat());
        let times = probed_times(&folder.path(name), "v:0");
        all.extend(times.iter().map(|t| t + start.parse::<f64>().unwrap()));
    }
    assert_eq!(all.len(), 60);
    for (n, time) in all.iter().enumerate() {
        assert!((time - n as f64 / 25.0).abs() < 1e-3, "{n}: {time}");
    }
}

#[test]
fn parts_that_do_not_exist_are_refused() {
    let folder = Folder::new();
    folder.clip("a.mp4", 50);
    scene(16, 16).save(folder.path("a.png")).unwrap();
    for (args, reason) in [
        (&["a.mp4", "b.mp4", "--start", "2.5"][..], "ends at 2.000 s"),
        (
            &["a.mp4", "b.mp4", "--start", "1:00"],
            "the start at 60.000 s",
        ),
        (
            &["a.mp4", "b.mp4", "--start", "1.01", "--duration", "0.02"],
            "no frame is shown",
        ),
        (&["a.mp4", "b.mp4", "--start", "soon"], "HH:MM:SS"),
        (&["a.mp4", "b.mp4", "--duration", "0"], "more than 0"),
        (&["a.png", "b.png", "--start", "1"], "--start is for videos"),
        (
            &["a.png", "b.png", "--duration", "1"],
            "--duration is for videos",
        ),
    ] {
        let said = folder.fails(args);
        assert!(said.contains(reason), "{args:?}: {said}");
    }
    assert_eq!(folder.files("."), ["a.mp4", "a.png"]);
    let said = folder.succeeds(&["a.mp4", "b.mp4", "--start", "1.8", "--duration", "9"]);
    assert!(
        said.contains("5 frames") && said.contains("before the end of the part"),
        "{said}"
    );
}

/// Returns the events on the standard output of a command, which has nothing else.
fn events(text: &str) -> Vec<serde_json::Value> {
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    text.lines().map(parse).collect()
}

#[test]
fn json_output_has_progress_notices_and_one_result() {
    let folder = Folder::new();
    folder.clip("a.mp4", 30);
    let (success, out, err) = folder.upscale(&["a.mp4", "b.webm", "--json"]);
    assert!(success, "{err}");
    assert_eq!(err, "");
    let events = events(&out);
    let of = |kind: &str| {
        events
            .iter()
            .filter(|e| e["event"] == kind)
            .collect::<Vec<_>>()
    };
    let progress = of("progress");
    assert!(!progress.is_empty() && progress.len() < 100, "{out}");
    let last = progress[progress.len() - 1];
    assert_eq!((&last["frames"], &last["of"]), (&30.into(), &30.into()));
    assert!(
        last["fps"].as_f64().unwrap() > 0.0 && last["eta_s"] == 0.0,
        "{last}"
    );
    let notices = of("notice");
    let mut notices = notices.iter().map(|n| n["message"].as_str().unwrap());
    assert!(notices.any(|n| n.contains("re-encoded")), "{out}");
    let done = events.last().unwrap();
    assert_eq!(
        (&done["event"], &done["path"]),
        (&"done".into(), &"b.webm".into())
    );
    assert_eq!(done["frames"], 30);
    assert_eq!((&done["width"], &done["height"]), (&128.into(), &96.into()));
    assert!(done["audio"][0].as_str().unwrap().contains("AAC"), "{done}");
    assert_eq!(of("done").len(), 1);
}

#[test]
fn json_output_of_pictures_folders_and_errors_ends_with_the_result() {
    let folder = Folder::new();
    fs::create_dir(folder.path("in")).unwrap();
    scene(16, 12).save(folder.path("in/a.png")).unwrap();
    scene(16, 12).save(folder.path("in/b.jpg")).unwrap();
    fs::write(folder.path("in/notes.txt"), "no picture").unwrap();

    let (success, out, err) = folder.upscale(&["in/a.png", "a.png", "--json"]);
    assert!(success, "{err}");
    let done = serde_json::json!({"event": "done", "path": "a.png", "width": 32, "height": 24});
    assert_eq!(events(&out), [done]);

    let (success, out, err) = folder.upscale(&["in", "out", "--json"]);
    assert!(success, "{err}");
    let lines = events(&out);
    assert_eq!(lines[0]["event"], "notice");
    assert!(lines[0]["message"].as_str().unwrap().contains("notes.txt"));
    let progress = &lines[lines.len() - 2];
    assert_eq!(
        (&progress["pictures"], &progress["of"]),
        (&2.into(), &2.into())
    );
    assert!(progress["per_second"].as_f64().unwrap() > 0.0, "{progress}");
    let done = &lines[lines.len() - 1];
    assert_eq!(
        (&done["event"], &done["pictures"]),
        (&"done".into(), &2.into())
    );

    fs::write(folder.path("in/c.png"), "no picture").unwrap();
    for args in [
        &["in", "out", "--json", "--overwrite"][..],
        &["in/a.png", "a.png", "--json"],
        &["nowhere.mp4", "a.mp4", "--json"],
    ] {
        let (success, out, err) = folder.upscale(args);
        let lines = events(&out);
        let last = lines.last().unwrap();
        assert!(!success && last["event"] == "error", "{args:?}: {out}");
        assert_eq!(last["stopped"], false);
        let message = last["message"].as_str().unwrap();
        assert!(err.contains(message), "{args:?}: {out} {err}");
        assert!(lines.iter().all(|e| e["event"] != "done"), "{out}");
    }
}

#[test]
fn json_output_of_a_broken_video_names_the_partial_file() {
    let folder = Folder::new();
    // The size changes after the first half.
    for (name, size) in [("1.ts", "64x48"), ("2.ts", "96x64")] {
        let source = format!("testsrc2=s={size}:r=25:d=1");
        let made = std::process::Command::new("ffmpeg")
            .current_dir(folder.0.path())
            .args([
                "-v", "error", "-f", "lavfi", "-i", &source, "-c:v", "libx264", name,
            ])
            .status();
        assert!(made.expect("ffmpeg is installed").success());
    }
    let mut bytes = fs::read(folder.path("1.ts")).unwrap();
    bytes.extend(fs::read(folder.path("2.ts")).unwrap());
    fs::write(folder.path("a.ts"), bytes).unwrap();
    let (success, out, _) = folder.upscale(&["a.ts", "b.mkv", "--json", "--strength", "0"]);
    let lines = events(&out);
    assert!(!success && lines.len() >= 2, "{out}");
    let partial = &lines[lines.len() - 2];
    assert_eq!(
        (&partial["event"], &partial["path"]),
        (&"partial".into(), &"b.partial.mkv".into()),
        "{out}"
    );
    assert_eq!(lines[lines.len() - 1]["event"], "error");
    let count = partial["frames"].as_u64().unwrap();
    assert_eq!(frames(&folder.path("b.partial.mkv")).len() as u64, count);
}

#[test]
fn webp_and_tiff_pictures_are_upscaled_as_their_png() {
    let folder = Folder::new();
    let alpha = RgbaImage::from_fn(20, 16, |x, y| {
        image::Rgba([200, (y * 9) as u8, 30, (x * 12) as u8])
    });
    for (name, image) in [
        ("rgb", DynamicImage::ImageRgb8(scene(33, 21))),
        ("alpha", DynamicImage::ImageRgba8(alpha)),
        (
            "deep",
            DynamicImage::ImageRgb8(scene(20, 16)).into_rgb16().into(),
        ),
    ] {
        image.save(folder.path(&format!("{name}.png"))).unwrap();
        folder.succeeds(&[&format!("{name}.png"), "expected.png", "--overwrite"]);
        let expected = image::open(folder.path("expected.png")).unwrap();
        for extension in ["webp", "tif", "TIFF"] {
            if name == "deep" && extension == "webp" {
                continue;
            }
            let input = format!("{name}.{extension}");
            image.save(folder.path(&input)).unwrap();
            let said = folder.succeeds(&[&input, "made.png", "--overwrite"]);
            assert!(!said.contains("bits"), "{said}");
            let made = image::open(folder.path("made.png")).unwrap();
            assert_eq!(made, expected, "{input}");
        }
    }
    // Lossy compression.
    folder.ffmpeg("-i rgb.png -c:v libwebp -quality 90 lossy.webp");
    folder.succeeds(&["lossy.webp", "lossy.jpg", "--width", "66"]);
    assert_eq!(size(&folder.path("lossy.jpg")), (66, 42));
    let whole = fs::read(folder.path("lossy.webp")).unwrap();
    fs::write(folder.path("cut.webp"), &whole[..whole.len() / 2]).unwrap();
    assert!(folder.fails(&["cut.webp", "cut.png"]).contains("cut.webp"));
    let whole = fs::read(folder.path("rgb.tif")).unwrap();
    fs::write(folder.path("cut.tif"), &whole[..whole.len() / 2]).unwrap();
    assert!(folder.fails(&["cut.tif", "cut.png"]).contains("cut.tif"));
    assert!(!folder.path("cut.png").exists());
}

#[test]
fn webp_and_tiff_pictures_of_a_folder_become_png() {
    let folder = Folder::new();
    fs::create_dir_all(folder.path("in/deep")).unwrap();
    scene(24, 16).save(folder.path("in/a.webp")).unwrap();
    scene(24, 16).save(folder.path("in/deep/b.tiff")).unwrap();
    scene(24, 16).save(folder.path("in/c.jpg")).unwrap();
    folder.succeeds(&["in", "out"]);
    assert_eq!(folder.files("out"), ["a.png", "c.jpg", "deep/b.png"]);
    assert_eq!(size(&folder.path("out/deep/b.png")), (48, 32));
    let said = folder.succeeds(&["in", "out", "--skip-existing"]);
    assert!(said.contains("3 were there"), "{said}");
    folder.succeeds(&["in/a.webp", "out", "--overwrite"]);
    assert_eq!(folder.files("out"), ["a.png", "c.jpg", "deep/b.png"]);
    scene(24, 16).save(folder.path("in/a.png")).unwrap();
    let said = folder.fails(&["in", "out", "--overwrite"]);
    assert!(
        said.contains("'a.png' and 'a.webp' would both become 'a.png'"),
        "{said}"
    );
    assert!(folder.fails(&["in/c.jpg", "c.webp"]).contains(".png, .jpg"));
}

#[test]
fn files_of_several_pictures_and_other_formats_are_refused_by_name() {
    let folder = Folder::new();
    folder.ffmpeg("-f lavfi -i testsrc2=s=32x24:r=5:d=0.6 -c:v libwebp_anim a.webp");
    let bytes = fs::read(folder.path("a.webp")).unwrap();
    let pictures = bytes.windows(4).filter(|chunk| chunk == b"ANMF").count();
    let said = folder.fails(&["a.webp", "b.png"]);
    let reason = format!("an animation of {pictures} pictures");
    assert!(pictures > 1 && said.contains(&reason), "{said}");
    // Two pages: the directory of the second one follows the first file.
    scene(16, 12).save(folder.path("one.tif")).unwrap();
    let mut bytes = fs::read(folder.path("one.tif")).unwrap();
    assert_eq!(&bytes[..2], b"II");
    let field = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let directory = field(&bytes, 4) as usize;
    let entries = usize::from(u16::from_le_bytes([bytes[directory], bytes[directory + 1]]));
    let end = directory + 2 + 12 * entries;
    let copy = bytes[directory..end + 4].to_vec();
    let next = bytes.len() as u32;
    bytes[end..end + 4].copy_from_slice(&next.to_le_bytes());
    bytes.extend(copy);
    fs::write(folder.path("two.tif"), &bytes).unwrap();
    assert!(folder.fails(&["two.tif", "b.png"]).contains("2 pictures"));
    // A list of pages without an end.
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&(directory as u32).to_le_bytes());
    fs::write(folder.path("endless.tif"), &bytes).unwrap();
    assert!(
        folder
            .fails(&["endless.tif", "b.png"])
            .contains("10000 pictures")
    );

    fs::write(
        folder.path("a.avif"),
        b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B",
    )
    .unwrap();
    assert!(folder.fails(&["a.avif", "b.png"]).contains("AVIF"));
    assert!(!folder.path("b.png").exists());
}

#[test]
fn training_data_may_be_webp_and_tiff() {
    let folder = Folder::new();
    fs::create_dir(folder.path("in")).unwrap();
    scene(300, 260).save(folder.path("in/a.webp")).unwrap();
    scene(300, 260).save(folder.path("in/b.tif")).unwrap();
    let mut command = Command::cargo_bin("tadsr-train").unwrap();
    let output = command
        .current_dir(folder.0.path())
        .args(["data", "check", "in"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && said.contains("photos: 2 "),
        "{said}"
    );
}
