//! `transcode` on many kinds of files: every frame, time, sound and colour is preserved. ffmpeg
//! makes the inputs, and ffprobe measures the outputs.
#![cfg(feature = "video")]

mod audio;
#[path = "../support/ffprobe.rs"]
mod ffprobe;
mod subtitles;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use tadsr::video::{End, Notice, Options, Reader, Transcoded, partial_path, transcode};

use ffprobe::ffprobe;

struct Clips(tempfile::TempDir);

impl Clips {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes a file by ffmpeg, with arguments separated by spaces.
    fn make(&self, name: &str, args: &str) -> PathBuf {
        let path = self.path(name);
        let output = Command::new("ffmpeg")
            .current_dir(self.0.path())
            .args(["-v", "error", "-y"])
            .args(args.split_whitespace())
            .arg(&path)
            .output()
            .expect("ffmpeg is installed");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ffmpeg {args}: {error}");
        path
    }
}

/// Transcodes `from` to `to` without changing the frames. Returns the notices as well.
fn same(from: &Path, to: &Path, encoder: &str) -> (Transcoded, Vec<String>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let lines = told.clone();
    let options = Options {
        encoder: encoder.into(),
        notice: Some(Notice(Arc::new(move |line: &str| {
            lines.lock().unwrap().push(line.to_string());
        }))),
        ..Options::default()
    };
    let reader = Reader::open(from).unwrap();
    let done = transcode(reader, to, &options, |frame| Ok(Some(frame.frame.clone()))).unwrap();
    let mut told = told.lock().unwrap().clone();
    told.extend(done.warnings.iter().cloned());
    (done, told)
}

/// Like [`same`], but asserts that the output is complete.
fn complete(from: &Path, to: &Path) -> Vec<String> {
    let (done, told) = same(from, to, "");
    assert!(matches!(done.end, End::Complete), "{from:?}: {done:?}");
    assert_eq!(done.path.as_deref(), Some(to));
    told
}

/// Returns the times of the decoded frames or packets of a stream, such as `v:0`, in order.
fn times(path: &Path, stream: &str) -> Vec<f64> {
    let entries = "frame=best_effort_timestamp_time";
    let text = ffprobe(path, &["-select_streams", stream, "-show_entries", entries]);
    let number = |line: &str| line.trim_matches(',').split(',').next()?.parse().ok();
    let mut times: Vec<f64> = text.lines().filter_map(number).collect();
    times.sort_by(f64::total_cmp);
    times
}

/// Returns the duration that the container states for a stream, in seconds.
fn duration(path: &Path, stream: &str) -> f64 {
    let entries = "stream=duration";
    let text = ffprobe(path, &["-select_streams", stream, "-show_entries", entries]);
    text.trim().trim_matches(',').parse().unwrap()
}

fn field(path: &Path, entry: &str) -> String {
    let text = ffprobe(path, &["-select_streams", "v:0", "-show_entries", entry]);
    text.trim().trim_matches(',').to_string()
}

fn audio_codec(path: &Path) -> String {
    let args = [
        "-select_streams",
        "a:0",
        "-show_entries",
        "stream=codec_name",
    ];
    ffprobe(path, &args).trim().trim_matches(',').to_string()
}

/// Asserts that two lists of times are equal except for a common offset.
fn assert_same_times(from: &[f64], to: &[f64], tolerance: f64, what: &str) {
    assert_eq!(from.len(), to.len(), "{what}");
    for (a, b) in from.iter().zip(to) {
        let (a, b) = (a - from[0], b - to[0]);
        assert!((a - b).abs() < tolerance, "{what}: {a} s became {b} s");
    }
}

const VIDEO: &str = "-f lavfi -i testsrc2=s=96x64:r=25:d=2";
const TONE: &str = "-f lavfi -i sine=r=48000:d=2";

#[test]
fn every_container_holds_every_frame() {
    let clips = Clips::new();
    let from = clips.make("in.mp4", &format!("{VIDEO} -c:v libx264"));
    for name in ["out.webm", "out.mp4", "out.mov", "out.mkv"] {
        let to = clips.path(name);
        complete(&from, &to);
        assert_same_times(&times(&from, "v"), &times(&to, "v"), 2e-3, name);
    }
}

#[test]
fn frames_of_a_variable_rate_keep_their_times() {
    let clips = Clips::new();
    let from = clips.make(
        // Some versions of ffmpeg give the last frame of an MP4 file no time to be shown.
        "in.mkv",
        "-f lavfi -i testsrc2=s=96x64:r=25:d=1 -vf \
         select='lt(n,9)',settb=1/1000,setpts='if(eq(N,8),2.5,N*N*0.015)/TB' -fps_mode passthrough \
         -enc_time_base 1/1000 -c:v libx264 -bf 3",
    );
    assert_eq!(times(&from, "v").len(), 9);
    for name in ["out.mp4", "out.mov", "out.mkv"] {
        let to = clips.path(name);
        complete(&from, &to);
        assert_same_times(&times(&from, "v"), &times(&to, "v"), 2e-3, name);
        if name != "out.mkv" {
            let shown = times(&from, "v");
            let shown = shown[shown.len() - 1] - shown[0];
            assert!(
                duration(&to, "v") >= shown,
                "{name}: {}",
                duration(&to, "v")
            );
        }
    }
}

#[test]
fn streams_that_begin_late_are_kept_in_sync() {
    let clips = Clips::new();
    for (name, args) in [
        ("audio.flv", format!("{VIDEO} -itsoffset 1.5 {TONE}")),
        ("video.flv", format!("-itsoffset 3 {VIDEO} {TONE}")),
        ("audio.mkv", format!("{VIDEO} -itsoffset 1.5 {TONE}")),
        ("video.ts", format!("-itsoffset 1.3 {VIDEO} {TONE}")),
    ] {
        let from = clips.make(name, &format!("{args} -c:v libx264 -c:a aac -ar 44100"));
        let to = clips.path(&format!("{name}.mp4"));
        complete(&from, &to);
        let (video, audio) = (times(&from, "v"), times(&from, "a"));
        assert_same_times(&video, &times(&to, "v"), 2e-3, name);
        let offset = |path: &Path| times(path, "a")[0] - times(path, "v")[0];
        assert!((offset(&from) - offset(&to)).abs() < 0.03, "{name}");
        assert!(times(&to, "a").len().abs_diff(audio.len()) <= 2, "{name}");
    }
}

#[test]
fn frames_of_two_views_keep_their_shape() {
    let clips = Clips::new();
    let shape = "stream=sample_aspect_ratio";
    for (name, args) in [
        ("in.mp4", "-x264-params frame-packing=3"),
        ("in.mkv", "-metadata:s:v:0 stereo_mode=left_right"),
        ("on.mkv", "-metadata:s:v:0 stereo_mode=top_bottom"),
    ] {
        let from = clips.make(name, &format!("{VIDEO} -c:v libx264 {args}"));
        for extension in ["mp4", "mkv"] {
            let to = clips.path(&format!("{name}.{extension}"));
            let told = complete(&from, &to);
            assert_eq!(field(&to, shape), field(&from, shape), "{to:?}");
            assert!(told.iter().any(|line| line.contains("stereo")), "{told:?}");
        }
    }
}

#[test]
fn an_edit_list_that_begins_between_key_frames_shows_all_its_frames() {
    let clips = Clips::new();
    let whole = format!("{VIDEO} {TONE} -c:v libx264 -g 24 -c:a aac");
    clips.make("whole.mp4", &whole);
    let from = clips.make("in.mp4", "-ss 0.6 -i whole.mp4 -c copy");
    let to = clips.path("out.mp4");
    complete(&from, &to);
    let shown = duration(&from, "v") * 25.0;
    assert!(
        (times(&to, "v").len() as f64 - shown).abs() < 0.5,
        "{shown}"
    );
    assert!((duration(&from, "a") - duration(&to, "a")).abs() < 0.05);
}

#[test]
fn a_change_of_the_pixels_shape_ends_the_video_with_a_word() {
    let clips = Clips::new();
    for (name, shape) in [("a.ts", "4/3"), ("b.ts", "16/9")] {
        clips.make(name, &format!("{VIDEO} -vf setdar={shape} -c:v mpeg2video"));
    }
    let both = [clips.path("a.ts"), clips.path("b.ts")].map(|path| std::fs::read(path).unwrap());
    let from = clips.path("both.ts");
    std::fs::write(&from, both.concat()).unwrap();
    let (done, _) = same(&from, &clips.path("out.mp4"), "");
    let End::Damaged(error) = &done.end else {
        panic!("{done:?}");
    };
    let text = error.to_string();
    assert!(text.contains("8:9 to 32:27"), "{text}");
}

#[test]
fn range_grey_and_depth_are_those_of_the_input() {
    let clips = Clips::new();
    let luma = |path: &Path| {
        let output = Command::new("ffmpeg")
            .args(["-v", "error", "-i"])
            .arg(path)
            .args([
                "-frames:v",
                "1",
                "-vf",
                "extractplanes=y",
                "-f",
                "rawvideo",
                "-",
            ])
            .output()
            .unwrap();
        output.stdout
    };
    for (name, args, format) in [
        ("full.mp4", "-c:v libx264 -pix_fmt yuvj420p", "yuvj420p"),
        (
            "full709.mp4",
            "-c:v libx264 -pix_fmt yuvj420p -colorspace bt709 -color_primaries bt709 -color_trc bt709 -movflags \
             write_colr",
            "yuvj420p",
        ),
        ("grey.mp4", "-c:v libx264 -pix_fmt gray", "yuvj420p"),
        ("rgb.mkv", "-c:v ffv1 -pix_fmt bgr0", "yuv420p"),
        ("deep.mp4", "-c:v libx264 -pix_fmt yuv422p10", "yuv422p10le"),
        (
            "deep444.mp4",
            "-c:v libx264 -pix_fmt yuv444p10",
            "yuv444p10le",
        ),
    ] {
        let from = clips.make(name, &format!("{VIDEO} {args}"));
        let to = clips.path(&format!("{name}.out.mp4"));
        complete(&from, &to);
        assert_eq!(field(&to, "stream=pix_fmt"), format, "{name}");
        if name == "full709.mp4" {
            assert_eq!(field(&to, "stream=color_range,color_space"), "pc,bt709");
        }
        if format == "yuvj420p" {
            let (from, to) = (luma(&from), luma(&to));
            let mean =
                |luma: &[u8]| luma.iter().map(|v| f64::from(*v)).sum::<f64>() / luma.len() as f64;
            assert!((mean(&from) - mean(&to)).abs() < 0.5, "{name}");
            let extent = |luma: &[u8]| luma.iter().max().unwrap() - luma.iter().min().unwrap();
            assert!(extent(&from).abs_diff(extent(&to)) < 8, "{name}");
        }
    }
}

#[test]
fn what_the_output_cannot_hold_is_said() {
    let clips = Clips::new();
    let alpha = format!("{VIDEO} -vf format=yuva420p -c:v libvpx-vp9 -auto-alt-ref 0");
    let from = clips.make("alpha.webm", &alpha);
    let told = complete(&from, &clips.path("alpha.mp4"));
    assert!(told.iter().any(|line| line.contains("alpha")), "{told:?}");
    std::fs::write(
        clips.path("chapters.txt"),
        ";FFMETADATA1\ntitle=Film\nartist=Someone\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=900\ntitle=One\n",
    )
    .unwrap();
    let args = format!("{VIDEO} -i chapters.txt -map 0:v -map_metadata 1 -c:v libx264");
    let from = clips.make("tags.mov", &format!("{args} -timecode 01:00:00:00"));
    let told = complete(&from, &clips.path("mov.mp4")).join("\n");
    let said = told.contains("chapters are left out") && told.contains("timecode");
    assert!(said, "{told}");
    let from = clips.make("tags.mkv", &args);
    for name in ["tags-out.mkv", "tags-out.mp4"] {
        let to = clips.path(name);
        let told = complete(&from, &to);
        let tags = ffprobe(&to, &["-show_entries", "format_tags=title,artist"]);
        assert!(
            tags.contains("Film") && tags.contains("Someone"),
            "{name}: {tags}"
        );
        let chapters = ffprobe(&to, &["-show_chapters"]);
        let said = told.iter().any(|line| line.contains("chapters"));
        assert!(
            chapters.contains("One") != said,
            "{name}: {chapters} {told:?}"
        );
    }
}

#[test]
fn of_several_videos_the_film_is_taken() {
    let clips = Clips::new();
    let from = clips.make(
        "in.mkv",
        &format!(
            "-f lavfi -i testsrc2=s=64x48:r=25:d=1 {VIDEO} -map 0 -map 1 -c:v libx264 -disposition:v:0 0 \
             -disposition:v:1 default"
        ),
    );
    let to = clips.path("out.mkv");
    complete(&from, &to);
    assert_eq!(field(&to, "stream=width,height"), "96,64");
    assert_eq!(times(&to, "v").len(), 50);
}

#[test]
fn frames_that_an_encoder_loses_are_an_error_with_both_numbers() {
    let clips = Clips::new();
    let from = clips.make("in.mp4", &format!("{VIDEO} -c:v libx264"));
    let to = clips.path("out.mp4");
    let (done, _) = same(&from, &to, "videorate drop-only=true max-rate=5 ! x264enc");
    let End::Incomplete(differences) = &done.end else {
        panic!("{done:?}");
    };
    let text = differences.join("; ");
    assert!(text.contains("50 frames were to be written"), "{text}");
    assert!(!to.exists());
    assert_eq!(done.path, Some(clips.path("out.partial.mp4")));
}

#[test]
fn texts_of_several_words_are_written_as_they_are() {
    let clips = Clips::new();
    std::fs::write(
        clips.path("chapters.txt"),
        ";FFMETADATA1\ntitle=My \"Film\" in fünf Wörtern\nartist=Some One\n[CHAPTER]\n\
         TIMEBASE=1/1000\nSTART=0\nEND=900\ntitle=The first part\n",
    )
    .unwrap();
    std::fs::write(clips.path("note.txt"), "a note").unwrap();
    let args = format!(
        "{VIDEO} {TONE} -i chapters.txt -map 0 -map 1 -map_metadata 2 -c:v libx264 -c:a aac \
         -metadata:s:a:0 title=Director's"
    );
    let attach = " -attach note.txt -metadata:s:t mimetype=text/plain";
    let from = clips.make("in.mkv", &(args.clone() + attach));
    for name in ["out.mkv", "out.webm", "out.mp4", "out.mov"] {
        let to = clips.path(name);
        complete(&from, &to);
        let tags = ffprobe(&to, &["-of", "flat", "-show_entries", "format_tags"]);
        let title = "=\"My \\\"Film\\\" in fünf Wörtern\"";
        assert!(tags.contains(title), "{name}: {tags}");
        assert!(
            tags.to_lowercase().contains("artist=\"some one\""),
            "{name}: {tags}"
        );
        let chapters = ffprobe(&to, &["-show_chapters"]);
        if name.starts_with("out.mkv") {
            let entries = "stream_tags=title";
            let title = ffprobe(&to, &["-select_streams", "a", "-show_entries", entries]);
            assert_eq!(title.trim(), "Director's");
            assert!(chapters.contains("The first part\n"), "{name}: {chapters}");
            let fonts = ffprobe(
                &to,
                &["-select_streams", "t", "-show_entries", "stream_tags"],
            );
            assert!(fonts.contains("note.txt"), "{fonts}");
        }
    }
}

/// Makes a transport stream of raw H.264 parts, which are made of arguments of ffmpeg.
fn joined(clips: &Clips, name: &str, parts: [&str; 2]) -> PathBuf {
    let mut stream = Vec::new();
    for (i, args) in parts.iter().enumerate() {
        let part = format!("{i}.h264");
        let video = format!("{VIDEO} -c:v libx264 -bf 0 {args}");
        stream.extend(std::fs::read(clips.make(&part, &video)).unwrap());
    }
    std::fs::write(clips.path("all.h264"), stream).unwrap();
    let args = "-fflags +genpts -r 25 -i all.h264 -c copy";
    clips.make(name, args)
}

#[test]
fn rotation_in_the_stream_is_applied_and_a_change_of_it_ends_the_video_with_a_word() {
    let clips = Clips::new();
    let turned =
        |angle: u32| format!("-bsf:v h264_metadata=display_orientation=insert:rotate={angle}");
    let from = joined(&clips, "turned.ts", [&turned(90), &turned(90)]);
    let to = clips.path("turned.mp4");
    complete(&from, &to);
    assert_eq!(field(&to, "stream=width,height"), "64,96");
    assert_eq!(times(&to, "v").len(), 100);
    // Compared with ffmpeg's rotation.
    let psnr = Command::new("ffmpeg")
        .args(["-i"])
        .arg(&from)
        .arg("-i")
        .arg(&to)
        .args(["-lavfi", "psnr", "-f", "null", "-"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&psnr.stderr).to_string();
    let psnr = text
        .split("average:")
        .nth(1)
        .and_then(|t| t.split(' ').next());
    let psnr: f64 = psnr
        .and_then(|v| v.parse().ok())
        .unwrap_or_else(|| panic!("{text}"));
    assert!(psnr > 30.0, "{psnr} dB");
    for (name, parts) in [
        ("later.ts", ["", &turned(180)[..]]),
        ("back.ts", [&turned(90), ""]),
    ] {
        let from = joined(&clips, name, parts);
        let (done, _) = same(&from, &clips.path(&format!("{name}.mp4")), "");
        let End::Damaged(error) = &done.end else {
            panic!("{name}: {done:?}");
        };
        let text = error.to_string();
        assert!(text.contains("rotation changes"), "{name}: {text}");
        assert_eq!(done.frames, 50, "{name}");
    }
}

#[test]
fn a_change_of_colours_ends_the_video_with_a_word() {
    let clips = Clips::new();
    let colours = |transfer: &str| {
        format!("-x264-params colorprim=bt2020:colormatrix=bt2020nc:transfer={transfer}")
    };
    let (sdr, hdr) = (colours("bt2020-10"), colours("smpte2084"));
    let from = joined(&clips, "in.ts", [&sdr, &hdr]);
    let (done, _) = same(&from, &clips.path("out.mp4"), "");
    let End::Damaged(error) = &done.end else {
        panic!("{done:?}");
    };
    let text = error.to_string();
    assert!(text.contains("colours change"), "{text}");
    assert_eq!(done.frames, 50);
}

#[test]
fn a_film_below_the_size_of_a_container_is_refused_with_both_sizes() {
    let clips = Clips::new();
    let from = clips.make("in.mkv", "-f lavfi -i testsrc2=s=8x6:r=25:d=1 -c:v ffv1");
    for name in ["out.mov", "out.mp4", "out.webm"] {
        let reader = Reader::open(&from).unwrap();
        let options = Options::default();
        let to = clips.path(name);
        let made = transcode(reader, &to, &options, |frame| Ok(Some(frame.frame.clone())));
        let text = made.unwrap_err().to_string();
        assert!(
            text.contains("8x6") && text.contains("16x16"),
            "{name}: {text}"
        );
        assert!(!to.exists() && !partial_path(&to).exists());
    }
    let to = clips.path("out.mkv");
    complete(&from, &to);
    assert_eq!(times(&to, "v").len(), 25);
}

#[test]
fn alpha_is_kept_by_encoders_that_have_it_and_otherwise_said() {
    let clips = Clips::new();
    let fade = "format=bgra,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='2*X+N'";
    let from = clips.make(
        "in.mkv",
        &format!("{VIDEO} -vf {fade} -c:v ffv1 -pix_fmt bgra"),
    );
    let alpha = |path: &Path| {
        let output = Command::new("ffmpeg")
            .args(["-v", "error", "-i"])
            .arg(path)
            .args(["-vf", "alphaextract,format=gray", "-f", "rawvideo", "-"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{path:?}: {output:?}");
        output.stdout
    };
    for (name, encoder) in [
        ("ffv1.mkv", "avenc_ffv1"),
        ("prores.mov", "avenc_prores_ks"),
        ("png.mov", "pngenc"),
    ] {
        let to = clips.path(name);
        let (done, told) = same(&from, &to, encoder);
        assert!(matches!(done.end, End::Complete), "{name}: {done:?}");
        assert!(
            !told.iter().any(|line| line.contains("alpha")),
            "{name}: {told:?}"
        );
        let (from, to) = (alpha(&from), alpha(&to));
        assert_eq!(from.len(), to.len(), "{name}");
        let worst = from.iter().zip(&to).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(worst.unwrap() <= 2, "{name}: {worst:?}");
    }
    for name in ["x264.mkv", "x264.mov", "x264.mp4"] {
        let told = complete(&from, &clips.path(name));
        let said = told
            .iter()
            .any(|line| line.contains("alpha") && line.contains("avenc_ffv1"));
        assert!(said, "{name}: {told:?}");
    }
}
