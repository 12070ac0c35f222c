//! Video files through the public API, with clips that GStreamer makes during the test.
#![cfg(feature = "video")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};

use gst::prelude::*;
use tadsr::{
    Error,
    frame::{ChromaSite, Frame, FrameInfo, Matrix, PixelFormat, Range},
    video::{
        End, Notice, Options, Reader, StreamInfo, TimedFrame, Writer, partial_path, transcode,
    },
};

/// Runs a launch line to its end.
fn launch(line: &str) {
    gst::init().unwrap();
    let pipeline = gst::parse::launch(line).unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let bus = pipeline.bus().unwrap();
    let types = [gst::MessageType::Eos, gst::MessageType::Error];
    let end = bus.timed_pop_filtered(gst::ClockTime::from_seconds(120), &types);
    pipeline.set_state(gst::State::Null).unwrap();
    let end = end.expect("an end within two minutes");
    assert_eq!(end.type_(), gst::MessageType::Eos, "{line}: {end:?}");
}

struct Clips(tempfile::TempDir);

impl Clips {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes a clip of `frames` frames with caps and encoder as in a launch line. The extension of
    /// the name selects the muxer.
    fn make(&self, name: &str, frames: u32, caps: &str, encoder: &str) -> PathBuf {
        let path = self.path(name);
        let mux = muxer(&path);
        launch(&format!(
            "videotestsrc num-buffers={frames} pattern=ball ! video/x-raw,{caps} ! {encoder} ! {mux} ! \
             filesink location={}",
            path.display()
        ));
        path
    }

    /// Like [`Self::make`], with `seconds` of a tone.
    fn make_with_tone(
        &self,
        name: &str,
        (frames, caps): (u32, &str),
        encoder: &str,
        seconds: u32,
        audio: &str,
    ) -> PathBuf {
        let path = self.path(name);
        let mux = muxer(&path);
        let buffers = seconds * 50;
        launch(&format!(
            "videotestsrc num-buffers={frames} pattern=ball ! video/x-raw,{caps} ! {encoder} ! queue ! mux. \
             audiotestsrc num-buffers={buffers} samplesperbuffer=960 ! audio/x-raw,rate=48000 ! {audio} ! queue ! mux. \
             {mux} name=mux ! filesink location={}",
            path.display()
        ));
        path
    }
}

fn muxer(path: &Path) -> &'static str {
    match path.extension().unwrap().to_str().unwrap() {
        "mp4" => "mp4mux",
        "mov" => "qtmux",
        "webm" => "webmmux",
        "ts" => "mpegtsmux",
        "avi" => "avimux",
        _ => "matroskamux",
    }
}

const CAPS: &str = "format=I420,width=64,height=48,framerate=25/1";

fn frames(path: &Path) -> Vec<TimedFrame> {
    Reader::open(path).unwrap().map(|f| f.unwrap()).collect()
}

fn times(frames: &[TimedFrame]) -> Vec<Duration> {
    frames.iter().map(|f| f.pts).collect()
}

fn message(path: &Path) -> String {
    match Reader::open(path) {
        Ok(_) => panic!("{path:?} was opened"),
        Err(e) => e.to_string(),
    }
}

/// Decodes the audio of `path`. Returns its length in seconds, 0 if there is none.
fn audio_seconds(path: &Path) -> f64 {
    gst::init().unwrap();
    let line = format!(
        "filesrc location={} ! decodebin name=d d. ! audio/x-raw ! audioconvert ! \
         audio/x-raw,format=S16LE,channels=1 ! appsink name=s sync=false d. ! video/x-raw ! fakesink sync=false",
        path.display()
    );
    let pipeline = gst::parse::launch(&line).unwrap();
    let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
    let sink = pipeline.by_name("s").unwrap();
    let sink = sink.downcast::<gst_app::AppSink>().unwrap();
    pipeline.set_state(gst::State::Playing).unwrap();
    let mut seconds = 0.0;
    while let Some(sample) = sink.try_pull_sample(gst::ClockTime::from_seconds(10)) {
        let rate: i32 = sample
            .caps()
            .unwrap()
            .structure(0)
            .unwrap()
            .get("rate")
            .unwrap();
        seconds += sample.buffer().unwrap().size() as f64 / 2.0 / f64::from(rate);
    }
    pipeline.set_state(gst::State::Null).unwrap();
    seconds
}

/// Returns the frame with each pixel doubled in width and height.
fn doubled(frame: &Frame) -> Frame {
    let info = frame.info();
    assert_eq!(info.format.planes(), 3, "planar frames");
    let mut large = Frame::new(info.with_size(2 * info.width, 2 * info.height)).unwrap();
    let sample = if info.format.depth() > 8 { 2 } else { 1 };
    for plane in 0..3 {
        let (row, _) = info.format.plane_size(plane, info.width, info.height);
        let (to_row, _) = info
            .format
            .plane_size(plane, 2 * info.width, 2 * info.height);
        let source = frame.plane(plane);
        for (y, line) in large.plane_mut(plane).chunks_mut(to_row).enumerate() {
            let from = &source[y / 2 * row..][..row];
            for (x, to) in line.chunks_mut(sample).enumerate() {
                to.copy_from_slice(&from[x / 2 * sample..][..sample]);
            }
        }
    }
    large
}

#[test]
fn frames_keep_count_time_size_and_colours() {
    let clips = Clips::new();
    let caps = "format=I420,width=66,height=50,framerate=30000/1001,pixel-aspect-ratio=8/9,\
                colorimetry=bt709,chroma-site=mpeg2";
    let path = clips.make("a.mp4", 40, caps, "x264enc");
    let mut reader = Reader::open(&path).unwrap();
    let stream = reader.stream().clone();
    assert_eq!(stream.framerate(), Some((30000, 1001)));
    assert_eq!(stream.pixel_aspect(), (8, 9));
    assert_eq!(stream.expected_frames(), Some(40));
    let info = stream.frame();
    assert_eq!((info.width, info.height), (66, 50));
    assert_eq!(info.colorimetry.matrix, Matrix::Bt709);
    assert_eq!(info.chroma_site, ChromaSite::MPEG2);
    let all: Vec<_> = reader.by_ref().map(|f| f.unwrap()).collect();
    assert_eq!(all.len(), 40);
    assert!(reader.warnings().is_empty() && reader.next().is_none());
    for (i, frame) in all.iter().enumerate() {
        let expected = i as f64 * 1001.0 / 30000.0;
        let pts = frame.pts.as_secs_f64();
        assert!((pts - expected).abs() < 1e-4, "{i}: {pts} {expected}");
    }
}

#[test]
fn depth_and_range_of_the_file_are_those_of_the_frames() {
    let clips = Clips::new();
    let deep = "format=I420_10LE,width=64,height=48,framerate=25/1,colorimetry=bt2020-10";
    let deep = frames(&clips.make("deep.mkv", 3, deep, "x264enc"));
    assert_eq!(deep[0].frame.info().format, PixelFormat::I420_10Le);
    assert_eq!(deep[0].frame.info().colorimetry.matrix, Matrix::Bt2020);
    let full = "format=I420,width=64,height=48,framerate=25/1,colorimetry=1:4:0:0";
    let full = frames(&clips.make("full.mkv", 3, full, "x264enc"));
    assert_eq!(full[0].frame.info().colorimetry.range, Range::Full);
    let raw = frames(&clips.make("raw.avi", 3, CAPS, "identity"));
    assert_eq!(raw.len(), 3);
    let wide = "format=Y444,width=33,height=17,framerate=25/1";
    let wide = frames(&clips.make("wide.mkv", 3, wide, "x264enc"));
    assert_eq!(wide[2].frame.info().format, PixelFormat::Y444);
    assert_eq!(
        (wide[2].frame.info().width, wide[2].frame.info().height),
        (33, 17)
    );
}

#[test]
fn interlaced_video_becomes_one_progressive_frame_for_each_frame() {
    let clips = Clips::new();
    let path = clips.make(
        "i.mkv",
        24,
        CAPS,
        "interlace field-pattern=2:2 ! x264enc interlaced=true",
    );
    let all = frames(&path);
    assert_eq!(all.len(), 24);
    let deep = CAPS.replace("I420", "I420_10LE");
    let encoder = "interlace field-pattern=2:2 ! x264enc interlaced=true";
    let path = clips.make("deep.mkv", 24, &deep, encoder);
    assert_eq!(frames(&path).len(), 24);
}

#[test]
fn pictures_that_the_file_says_are_turned_come_upright() {
    let clips = Clips::new();
    let path = clips.make("t.mp4", 3, CAPS, "x264enc");
    let mut bytes = fs::read(&path).unwrap();
    let track = bytes.windows(4).position(|w| w == b"tkhd").unwrap();
    // Matrix of a track header (ISO/IEC 14496-12 section 8.3.2): a quarter turn.
    let matrix = [0, 0x0001_0000, 0, -0x0001_0000, 0, 0, 0, 0, 0x4000_0000_i32];
    let matrix: Vec<u8> = matrix.iter().flat_map(|v| v.to_be_bytes()).collect();
    bytes[track + 44..][..36].copy_from_slice(&matrix);
    fs::write(&path, bytes).unwrap();
    let info = *Reader::open(&path).unwrap().stream().frame();
    assert_eq!((info.width, info.height), (48, 64));
}

#[test]
fn reading_can_start_anywhere() {
    let clips = Clips::new();
    let path = clips.make("s.mp4", 100, CAPS, "x264enc key-int-max=10");
    let mut reader = Reader::open(&path).unwrap();
    assert_eq!(reader.codec(), "H.264");
    reader.seek(Duration::from_millis(2050)).unwrap();
    let rest: Vec<_> = reader.map(|f| f.unwrap()).collect();
    assert_eq!(rest.len(), 50);
    // Times are those of the file, which has 25 frames per second.
    assert_eq!(rest[0].pts, Duration::from_secs(2));
}

#[test]
fn what_is_no_video_is_refused_with_the_files_name_and_the_reason() {
    let clips = Clips::new();
    let text = clips.path("text.mp4");
    fs::write(
        &text,
        "this is no video, however long it may be\n".repeat(50),
    )
    .unwrap();
    let empty = clips.path("empty.mp4");
    fs::write(&empty, "").unwrap();
    let missing = clips.path("missing.mp4");
    for (path, reason) in [
        (&text, "text file"),
        (&empty, "empty"),
        (&missing, "No such file"),
        (&clips.path(""), "regular file"),
    ] {
        let text = message(path);
        assert!(
            text.contains(path.to_str().unwrap()) && text.contains(reason),
            "{text}"
        );
    }
    let tone = clips.path("tone.mka");
    launch(&format!(
        "audiotestsrc num-buffers=20 ! avenc_aac ! matroskamux ! filesink location={}",
        tone.display()
    ));
    assert!(message(&tone).contains("no video in it, only AAC"));
}

#[test]
fn a_file_that_breaks_off_gives_what_is_there_and_says_so() {
    let clips = Clips::new();
    for (name, mux) in [
        ("cut.mkv", "matroskamux"),
        ("cut.mp4", "mp4mux faststart=true"),
        ("cut.ts", "mpegtsmux"),
    ] {
        let path = clips.path(name);
        launch(&format!(
            "videotestsrc num-buffers=150 pattern=snow ! video/x-raw,{CAPS} ! x264enc key-int-max=10 ! {mux} ! \
             filesink location={}",
            path.display()
        ));
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        let (mut good, mut error) = (0, None);
        for frame in reader.by_ref() {
            match frame {
                Ok(_) => good += 1,
                Err(e) => error = Some(e.to_string()),
            }
        }
        assert!((50..110).contains(&good), "{name}: {good} frames");
        let said = error.is_some() || !reader.warnings().is_empty();
        // A transport stream does not state its length.
        assert!(said || name == "cut.ts", "{name}");
        eprintln!("{name}: {good} frames, {error:?}, {:?}", reader.warnings());
    }
    let headless = clips.make("headless.mp4", 50, CAPS, "x264enc");
    let bytes = fs::read(&headless).unwrap();
    fs::write(&headless, &bytes[..bytes.len() / 2]).unwrap();
    let text = message(&headless);
    assert!(text.contains("headless.mp4"), "{text}");
    eprintln!("{text}");
}

#[test]
fn a_video_that_is_shorter_than_its_audio_is_not_taken_for_cut_off() {
    let clips = Clips::new();
    let path = clips.make_with_tone("a.mp4", (25, CAPS), "x264enc", 4, "avenc_aac");
    let mut reader = Reader::open(&path).unwrap();
    assert_eq!(reader.by_ref().filter(|f| f.is_ok()).count(), 25);
    assert!(reader.warnings().is_empty(), "{:?}", reader.warnings());
}

#[test]
fn a_file_goes_through_with_all_frames_times_colours_and_its_audio() {
    let clips = Clips::new();
    let caps = "format=I420,width=64,height=48,framerate=24000/1001,pixel-aspect-ratio=8/9,\
                colorimetry=bt709,chroma-site=mpeg2";
    let from = clips.make_with_tone("in.mp4", (48, caps), "x264enc", 2, "avenc_aac");
    for (name, audio) in [
        ("out.mp4", "AAC copied"),
        ("out.mkv", "AAC copied"),
        ("out.mov", "AAC copied"),
        ("out.webm", "AAC re-encoded"),
    ] {
        let to = clips.path(name);
        let done = transcode(
            Reader::open(&from).unwrap(),
            &to,
            &Options::default(),
            |f| Ok(Some(doubled(&f.frame))),
        )
        .unwrap();
        assert!(matches!(done.end, End::Complete), "{done:?}");
        assert_eq!(
            (done.frames, done.path.as_deref()),
            (48, Some(to.as_path()))
        );
        assert!(
            done.audio[0].contains(audio) && done.audio.len() == 1,
            "{done:?}"
        );
        assert!(!partial_path(&to).exists());

        let reader = Reader::open(&to).unwrap();
        let stream = reader.stream().clone();
        let info = stream.frame();
        assert_eq!((info.width, info.height), (128, 96), "{name}");
        assert_eq!(info.colorimetry.matrix, Matrix::Bt709, "{name}");
        assert_eq!(info.colorimetry.range, Range::Limited, "{name}");
        assert_eq!(stream.pixel_aspect(), (8, 9), "{name}");
        let (num, den) = stream.framerate().unwrap();
        assert!(
            (f64::from(num) / f64::from(den) - 24000.0 / 1001.0).abs() < 0.02,
            "{name}"
        );
        let all: Vec<_> = reader.map(|f| f.unwrap()).collect();
        // Matroska counts in milliseconds.
        let tolerance = if name.ends_with("mp4") || name.ends_with("mov") {
            1e-4
        } else {
            1e-3
        };
        let expected = times(&frames(&from));
        assert_eq!(all.len(), expected.len(), "{name}");
        for (frame, expected) in all.iter().zip(expected) {
            let (is, must) = (frame.pts.as_secs_f64(), expected.as_secs_f64());
            assert!((is - must).abs() < tolerance, "{name}: {is} {must}");
        }
        let seconds = audio_seconds(&to);
        assert!((seconds - 2.0).abs() < 0.1, "{name}: {seconds} s of audio");
    }
}

#[test]
fn audio_streams_may_begin_late_and_end_early() {
    let clips = Clips::new();
    for (name, first, second) in [
        ("early.mp4", "num-buffers=100", "num-buffers=400"),
        (
            "late.mkv",
            "num-buffers=400",
            "num-buffers=100 timestamp-offset=5000000000",
        ),
    ] {
        let from = clips.path(name);
        let queue = "queue max-size-time=0 max-size-buffers=0 max-size-bytes=0";
        let tone = |options| {
            format!(
                "audiotestsrc {options} samplesperbuffer=960 ! audio/x-raw,rate=48000 ! avenc_aac ! {queue} ! mux."
            )
        };
        launch(&format!(
            "videotestsrc num-buffers=80 ! video/x-raw,format=I420,width=32,height=32,framerate=10/1 ! x264enc ! \
             {queue} ! mux. {} {} {} name=mux ! filesink location={}",
            tone(first),
            tone(second),
            muxer(&from),
            from.display()
        ));
        for out in ["mp4", "mkv"] {
            let to = clips.path(&format!("{name}-out.{out}"));
            let same = |f: &TimedFrame| Ok(Some(f.frame.clone()));
            let reader = Reader::open(&from).unwrap();
            let done = transcode(reader, &to, &Options::default(), same).unwrap();
            assert!(matches!(done.end, End::Complete), "{done:?}");
            assert_eq!((done.frames, done.audio.len()), (80, 2), "{done:?}");
        }
    }
}

#[test]
fn ten_bits_stay_ten_bits() {
    let clips = Clips::new();
    let caps = "format=I420_10LE,width=64,height=48,framerate=25/1,colorimetry=bt2100-pq,chroma-site=mpeg2";
    let from = clips.make("in.mkv", 5, caps, "x264enc");
    for (name, encoder) in [
        ("a.mp4", ""),
        ("b.mkv", "x265enc speed-preset=ultrafast"),
        ("c.mp4", "x265enc"),
    ] {
        let to = clips.path(name);
        let options = Options {
            encoder: encoder.into(),
            ..Options::default()
        };
        let reader = Reader::open(&from).unwrap();
        transcode(reader, &to, &options, |f| Ok(Some(doubled(&f.frame)))).unwrap();
        let all = frames(&to);
        assert_eq!(all.len(), 5, "{name}");
        assert_eq!(all[0].frame.info().format, PixelFormat::I420_10Le, "{name}");
        assert_eq!(
            all[0].frame.info().colorimetry.matrix,
            Matrix::Bt2020,
            "{name}"
        );
    }
}

#[test]
fn alpha_and_depth_are_kept_by_encoders_that_support_them() {
    use PixelFormat::*;
    let clips = Clips::new();
    let lossless = "avenc_ffv1";
    for (name, format, encoder) in [
        ("a.mkv", A420, lossless),
        ("b.mkv", Gbra10Le, lossless),
        ("c.mkv", Gray16Le, lossless),
        ("d.mkv", Gbr12Le, lossless),
        ("e.mov", Rgba, "pngenc"),
        ("f.mov", A444_10Le, "avenc_prores_ks"),
        ("g.webm", I420_12Le, ""),
        ("h.webm", P012Le, ""),
        ("i.webm", Gray16Le, ""),
    ] {
        let info = FrameInfo::new(format, 64, 48);
        let mut frame = Frame::new(info).unwrap();
        for (c, at) in format.components().iter().enumerate() {
            let (w, h) = format.component_size(at.component, 64, 48);
            let level = |i: usize| 0.2 + 0.1 * c as f32 + 0.3 * (i % w) as f32 / w as f32;
            let samples: Vec<f32> = (0..w * h).map(level).collect();
            frame.as_mut().write(at.component, &samples).unwrap();
        }
        let to = clips.path(name);
        let told = Arc::new(Mutex::new(Vec::new()));
        let lines = told.clone();
        let options = Options {
            encoder: encoder.into(),
            notice: Some(Notice(Arc::new(move |line| {
                lines.lock().unwrap().push(line.to_owned());
            }))),
            ..Options::default()
        };
        let stream = StreamInfo::new(info, Some((25, 1))).unwrap();
        let mut writer = Writer::create(&to, &stream, &options, None).unwrap();
        for i in 0..3 {
            let timed = TimedFrame {
                frame: frame.clone(),
                pts: Duration::from_millis(40 * i),
                duration: Some(Duration::from_millis(40)),
            };
            writer.push(&timed).unwrap();
        }
        writer.finish(false).unwrap();
        let all = frames(&to);
        let got = &all[2].frame;
        match encoder {
            // The default encoder of WebM has 12 bits in 4:2:0.
            "" => assert_eq!(got.info().format, I420_12Le, "{name}"),
            _ => assert_eq!(got.info().format, format, "{name}"),
        }
        if [lossless, "pngenc"].contains(&encoder) {
            for plane in 0..format.planes() {
                assert!(got.plane(plane) == frame.plane(plane), "{name} {plane}");
            }
        }
        let told = told.lock().unwrap();
        let reduced = told
            .iter()
            .any(|line| line.contains("16 bits a sample become 12"));
        assert_eq!(reduced, name == "i.webm", "{name}: {told:?}");
        assert!(told.len() <= usize::from(reduced), "{name}: {told:?}");
    }
}

#[test]
fn stopping_leaves_a_file_that_plays_under_another_name() {
    let clips = Clips::new();
    let from = clips.make_with_tone("in.mp4", (100, CAPS), "x264enc", 4, "avenc_aac");
    let to = clips.path("out.mp4");
    let mut count = 0;
    let done = transcode(
        Reader::open(&from).unwrap(),
        &to,
        &Options::default(),
        |f| {
            count += 1;
            Ok((count <= 50).then(|| f.frame.clone()))
        },
    )
    .unwrap();
    assert!(matches!(done.end, End::Stopped) && !to.exists());
    assert_eq!(
        done.path.as_deref(),
        Some(clips.path("out.partial.mp4").as_path())
    );
    assert_eq!(frames(&clips.path("out.partial.mp4")).len(), 50);
    let seconds = audio_seconds(&clips.path("out.partial.mp4"));
    assert!((seconds - 2.0).abs() < 0.1, "{seconds} s of audio");
}

#[test]
fn a_failure_of_the_function_leaves_nothing() {
    let clips = Clips::new();
    let from = clips.make("in.mp4", 20, CAPS, "x264enc");
    let to = clips.path("out.mp4");
    let mut count = 0;
    let result = transcode(
        Reader::open(&from).unwrap(),
        &to,
        &Options::default(),
        |f| {
            count += 1;
            match count {
                10 => Err(Error::Frame("on purpose".into())),
                _ => Ok(Some(f.frame.clone())),
            }
        },
    );
    assert!(result.unwrap_err().to_string().contains("on purpose"));
    assert!(!to.exists() && !partial_path(&to).exists());
}

#[test]
fn what_cannot_be_written_is_refused_with_a_reason() {
    let clips = Clips::new();
    let from = clips.make("in.mp4", 5, CAPS, "x264enc");
    for (name, encoder, reason) in [
        ("out.avi", "", ".mp4"),
        ("nowhere/out.mp4", "", "No such file"),
        ("out.mp4", "nosuchenc", "nosuchenc"),
        ("out.webm", "x264enc", "another encoder or extension"),
        ("out.mp4", "fakesink", "not an encoder"),
    ] {
        let options = Options {
            encoder: encoder.into(),
            ..Options::default()
        };
        let reader = Reader::open(&from).unwrap();
        let result = transcode(reader, &clips.path(name), &options, |f| {
            Ok(Some(f.frame.clone()))
        });
        let text = result.unwrap_err().to_string();
        assert!(text.contains(reason), "{name} {encoder}: {text}");
    }
    // An encoder that fails during the work must not block.
    let options = Options {
        encoder: "identity error-after=3 ! x264enc".into(),
        ..Options::default()
    };
    let from = clips.make("long.mp4", 60, CAPS, "x264enc");
    let reader = Reader::open(&from).unwrap();
    let result = transcode(reader, &clips.path("out.mp4"), &options, |f| {
        Ok(Some(f.frame.clone()))
    });
    assert!(result.is_err());
}

#[test]
fn a_video_that_changes_ends_there_with_the_frames_until_then() {
    let clips = Clips::new();
    for (name, other) in [
        ("size", "width=32,height=32"),
        ("colours", "width=64,height=48,colorimetry=bt709"),
    ] {
        let path = clips.path(&format!("{name}.ts"));
        launch(&format!(
            "concat name=c ! h264parse ! mpegtsmux ! filesink location={} \
             videotestsrc num-buffers=20 ! video/x-raw,{CAPS},colorimetry=bt601 ! x264enc key-int-max=5 ! \
             video/x-h264,stream-format=byte-stream ! c. \
             videotestsrc num-buffers=20 ! video/x-raw,format=I420,{other},framerate=25/1 ! x264enc key-int-max=5 ! \
             video/x-h264,stream-format=byte-stream ! c.",
            path.display()
        ));
        let to = clips.path(&format!("{name}.mp4"));
        let same = |f: &TimedFrame| Ok(Some(f.frame.clone()));
        let done = transcode(Reader::open(&path).unwrap(), &to, &Options::default(), same).unwrap();
        let End::Damaged(error) = &done.end else {
            panic!("{done:?}")
        };
        let (error, is) = (
            error.to_string(),
            if name == "size" { "32x32" } else { "BT.709" },
        );
        assert!(
            error.contains("64x48 (BT.601") && error.contains(is),
            "{error}"
        );
        assert_eq!(done.path, Some(partial_path(&to)));
        assert_eq!(frames(&partial_path(&to)).len() as u64, done.frames);
        assert!(done.frames >= 15, "{done:?}");
    }
}

#[test]
fn grey_and_odd_frames_find_an_encoder_that_takes_them() {
    let clips = Clips::new();
    let from = clips.make(
        "in.mkv",
        3,
        "format=GRAY8,width=33,height=17,framerate=25/1",
        "identity",
    );
    let reader = Reader::open(&from).unwrap();
    let info = *reader.stream().frame();
    assert_eq!((info.width, info.height), (33, 17));
    let done = transcode(reader, &clips.path("o.mkv"), &Options::default(), |f| {
        Ok(Some(Frame::new(FrameInfo {
            width: 66,
            height: 34,
            ..*f.frame.info()
        })?))
    });
    assert_eq!(done.unwrap().frames, 3);
}

#[test]
fn a_request_to_stop_does_not_wait_for_a_slow_encoder() {
    let clips = Clips::new();
    let from = clips.make("in.mp4", 60, CAPS, "x264enc");
    let options = Options {
        encoder: "identity sleep-time=200000 ! x264enc speed-preset=ultrafast tune=zerolatency"
            .into(),
        stop: Some(Arc::new(AtomicBool::new(true))),
        ..Options::default()
    };
    let reader = Reader::open(&from).unwrap();
    let done = transcode(reader, &clips.path("out.mp4"), &options, |f| {
        Ok(Some(f.frame.clone()))
    });
    let done = done.unwrap();
    assert!(matches!(done.end, End::Stopped));
    // Frames in the encoder's queue are in the file, and it plays.
    assert!((1..20).contains(&done.frames), "{}", done.frames);
    let kept = frames(&clips.path("out.partial.mp4"));
    assert_eq!(kept.len() as u64, done.frames);
}
