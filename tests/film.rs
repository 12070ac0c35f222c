//! `tadsr-train upscale` of videos in segments: after a crash, by several processes, in folders.
//! ffmpeg makes the inputs and decodes the outputs.
#![cfg(all(feature = "train", feature = "video"))]

#[path = "support/ffprobe.rs"]
mod ffprobe;
#[path = "support/tool.rs"]
mod tool;

use std::{
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use ffprobe::ffprobe;
use tool::Folder;

/// A scene of 6 s with a key frame each second, a tone and subtitles.
const VIDEO: &str = "-f lavfi -i testsrc2=s=64x48:r=25:d=6";
const TONE: &str = "-f lavfi -i sine=r=48000:d=6";
const H264: &str = "-c:v libx264 -g 25 -keyint_min 25 -sc_threshold 0 -bf 3";

/// Segments of a second by a small model.
const SECONDS: [&str; 6] = ["--segment-length", "1", "--model", "tiny", "--scale", "2"];

/// Frames that the output has unchanged.
const SAME: [&str; 6] = [
    "--strength",
    "0",
    "--scale",
    "1",
    "--encoder",
    "x264enc pass=quant quantizer=0 speed-preset=veryfast",
];

fn film(folder: &Folder, name: &str, args: &str) {
    let subtitles = "1\n00:00:00,200 --> 00:00:00,700\nOne\n\n\
                     2\n00:00:04,000 --> 00:00:05,500\nTwo\n\n";
    fs::write(folder.path("s.srt"), subtitles).unwrap();
    folder.ffmpeg(&format!(
        "{VIDEO} {TONE} -i s.srt -map 0 -map 1 -map 2 {args} {name}"
    ));
}

/// Returns times and checksums of the streams of a file that ffmpeg's `args` select.
fn hashes(path: &Path, args: &str) -> String {
    let output = Command::new("ffmpeg")
        .args(["-v", "error", "-i"])
        .arg(path)
        .args(args.split(' '))
        .args(["-f", "framemd5", "-"])
        .output()
        .expect("ffmpeg is installed");
    assert!(output.status.success(), "{path:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns times and checksums of the decoded frames of a file.
fn decoded(path: &Path) -> String {
    let frames = hashes(path, "-map 0:v -fps_mode passthrough");
    assert!(frames.lines().count() > 20, "{path:?}: {frames}");
    frames
}

/// Returns [`decoded`] and times and checksums of the packets of sound and subtitles, of which the
/// file has some.
fn content(path: &Path) -> String {
    decoded(path) + &hashes(path, "-map 0:a? -map 0:s? -c copy")
}

/// Returns the number of frames that can be decoded.
fn frames(path: &Path) -> u64 {
    let video = ["-select_streams", "v", "-count_frames"];
    let entries = ["-show_entries", "stream=nb_read_frames"];
    let text = ffprobe(path, &[video.as_slice(), &entries].concat());
    text.trim().trim_matches(',').parse().unwrap()
}

fn start(folder: &Folder, args: &[&str]) -> Child {
    Command::new(assert_cmd::cargo::cargo_bin("tadsr-train"))
        .current_dir(folder.0.path())
        .arg("upscale")
        .args(args)
        .stdout(Stdio::null())
        .stderr(fs::File::create(folder.path("stderr")).unwrap())
        .spawn()
        .unwrap()
}

/// Waits until the file exists that `child` makes.
fn wait_for(child: &mut Child, file: &Path) {
    while !file.exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_film_goes_on_after_a_kill_and_equals_an_uninterrupted_one() {
    let folder = Folder::new();
    film(&folder, "a.mkv", &format!("{H264} -c:a aac -c:s srt"));
    for (whole, killed) in [("b.mkv", "c.mkv"), ("b.mp4", "c.mp4")] {
        folder.succeeds(&[&["a.mkv", whole], &SECONDS[..]].concat());
        let args = [&["a.mkv", killed], &SECONDS[..]].concat();
        let mut child = start(&folder, &args);
        let segments = folder.path(&format!("{killed}.segments"));
        wait_for(&mut child, &segments.join("00002.segment"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(segments.join("00001.segment").exists());
        assert!(!folder.path(killed).exists());
        let said = folder.succeeds(&args);
        assert!(said.contains("of 6 segments are finished"), "{said}");
        assert!(said.contains("150 frames, 64x48 to 128x96"), "{said}");
        assert_eq!(content(&folder.path(killed)), content(&folder.path(whole)));
        assert!(!segments.exists());
    }
    let left = folder.files(".");
    let expected = [
        "a.mkv", "b.mkv", "b.mp4", "c.mkv", "c.mp4", "s.srt", "stderr",
    ];
    assert_eq!(left, expected);
}

#[test]
fn segments_lose_nothing_of_what_an_unsegmented_film_has() {
    let folder = Folder::new();
    fs::write(folder.path("font.ttf"), [7; 3000]).unwrap();
    let attach = "-attach font.ttf -metadata:s:t mimetype=font/ttf -metadata title=A_Film";
    film(
        &folder,
        "whole.mkv",
        &format!("{H264} -c:a aac -c:s srt {attach}"),
    );
    let vfr = "-vf select='gt(mod(n,7),2)',settb=1/1000 -fps_mode passthrough \
               -enc_time_base 1/1000";
    film(
        &folder,
        "vfr.mkv",
        &format!("{vfr} {H264} -c:a libopus -c:s srt"),
    );
    film(
        &folder,
        "tx3g.mp4",
        &format!("{H264} -c:a aac -c:s mov_text"),
    );
    folder.ffmpeg("-ss 0.6 -i tx3g.mp4 -map 0 -c copy edited.mp4");
    // One key frame.
    film(
        &folder,
        "long.mkv",
        "-c:v libx264 -g 999 -bf 3 -c:a ac3 -c:s srt",
    );
    let turned = "-bsf:v h264_metadata=display_orientation=insert:rotate=90";
    folder.ffmpeg(&format!(
        "{VIDEO} -itsoffset 1.3 {TONE} -c:v libx264 -g 999 {turned} -c:a aac turned.ts"
    ));
    for input in [
        "whole.mkv",
        "vfr.mkv",
        "tx3g.mp4",
        "edited.mp4",
        "long.mkv",
        "turned.ts",
    ] {
        for extension in ["mkv", "mp4"] {
            let name = |kind: &str| format!("{input}.{kind}.{extension}");
            let (one, many) = (name("one"), name("many"));
            let told = folder.succeeds(&[&[input, &one], &SAME[..]].concat());
            let segments = ["--segment-length", "1"];
            let list =
                folder.succeeds(&[&[input, &many, "--list-segments"], &segments[..]].concat());
            assert!(list.lines().count() > 2, "{input}: {list}");
            let said = folder.succeeds(&[&[input, &many], &SAME[..], &segments].concat());
            // The changes, such as audio that is re-encoded.
            assert_eq!(told.lines().count(), said.lines().count(), "{told} {said}");
            let (one, many) = (folder.path(&one), folder.path(&many));
            assert_eq!(content(&one), content(&many), "{many:?}");
            for entries in [
                "stream=codec_name,width,height,r_frame_rate,start_time,color_space",
                "stream_tags=language,title,filename",
                "format_tags=title",
            ] {
                let probed = |path: &Path| ffprobe(path, &["-show_entries", entries]);
                assert_eq!(probed(&one), probed(&many), "{many:?}");
            }
        }
    }
}

#[test]
fn segments_of_every_encoder_can_be_joined() {
    let folder = Folder::new();
    folder.ffmpeg("-f lavfi -i testsrc2=s=64x48:r=25:d=2 -c:v libx264 -g 25 a.mkv");
    for (encoder, extension, is_lossless) in [
        ("avenc_ffv1", "mkv", true),
        ("pngenc", "mov", true),
        ("x265enc speed-preset=ultrafast", "mp4", false),
        ("vp8enc deadline=1", "webm", false),
        ("av1enc cpu-used=8", "mkv", false),
    ] {
        let args = ["--strength", "0", "--scale", "1", "--encoder", encoder];
        let [one, many] = ["one", "many"].map(|name| format!("{name}.{extension}"));
        let replace = ["--overwrite", "--segment-length", "1"];
        folder.succeeds(&[&["a.mkv", &one, "--overwrite"], &args[..]].concat());
        folder.succeeds(&[&["a.mkv", &many], &args[..], &replace].concat());
        let times = |name: &str| {
            let entries = "frame=best_effort_timestamp_time";
            ffprobe(
                &folder.path(name),
                &["-select_streams", "v", "-show_entries", entries],
            )
        };
        assert_eq!(frames(&folder.path(&many)), 50, "{encoder}");
        if is_lossless {
            let [one, many] = [&one, &many].map(|name| decoded(&folder.path(name)));
            assert!(one == many, "{encoder}");
        }
        // Side data adds empty fields and lines.
        let [one, many] = [&one, &many].map(|name| {
            let times = times(name).replace(',', "\n");
            times.split_whitespace().collect::<Vec<_>>().join(" ")
        });
        assert_eq!(one, many, "{encoder}");
    }
}

#[test]
fn tasks_of_one_segment_each_make_the_same_film_in_any_order() {
    let folder = Folder::new();
    film(&folder, "a.mkv", &format!("{H264} -c:a aac -c:s srt"));
    let temporal = ["--temporal", "filter"];
    let run = |output: &str, more: &[&str]| {
        folder.upscale(&[&["a.mkv", output], &SECONDS[..], &temporal, more].concat())
    };
    assert!(run("b.mkv", &[]).0);
    let (_, list, _) = run("c.mkv", &["--list-segments"]);
    let lines: Vec<Vec<&str>> = list.lines().map(|l| l.split('\t').collect()).collect();
    assert_eq!(lines.len(), 6);
    for (number, line) in (1..).zip(&lines) {
        let (start, end): (f64, f64) = (line[1].parse().unwrap(), line[2].parse().unwrap());
        assert_eq!((line[0], line[3]), (number.to_string().as_str(), "25"));
        assert!((end - start - 1.0).abs() < 0.002, "{list}");
    }
    assert!(
        lines.windows(2).all(|pair| pair[0][2] == pair[1][1]),
        "{list}"
    );
    let (made, _, said) = run("c.mkv", &["--join"]);
    assert!(!made && said.contains("--segment"), "{said}");

    let start = |number: &str| {
        let args = [&["a.mkv", "c.mkv"], &SECONDS[..], &temporal];
        start(
            &folder,
            &[&args.concat()[..], &["--segment", number]].concat(),
        )
    };
    // Two at once, and one segment by two.
    let mut tasks = ["5", "2", "2"].map(start);
    tasks
        .iter_mut()
        .for_each(|task| assert!(task.wait().unwrap().success()));
    for number in ["4", "1", "2", "6"] {
        let (made, out, said) = run("c.mkv", &["--segment", number]);
        assert!(made, "{said}");
        assert_eq!(out.contains("is already finished"), number == "2", "{out}");
    }
    let (made, _, said) = run("c.mkv", &["--join"]);
    assert!(!made && said.contains("these are missing: 3;"), "{said}");
    // A task that is killed is tried again.
    let mut task = start("3");
    task.kill().unwrap();
    task.wait().unwrap();
    let (made, _, said) = run("c.mkv", &["--segment", "7"]);
    assert!(!made && said.contains("segments 1 to 6"), "{said}");
    assert!(run("c.mkv", &["--segment", "3"]).0);
    let (made, out, said) = run("c.mkv", &["--join"]);
    assert!(made && out.contains("150 frames"), "{out} {said}");
    assert_eq!(
        content(&folder.path("b.mkv")),
        content(&folder.path("c.mkv"))
    );
    assert!(!folder.path("c.mkv.segments").exists());
}

#[test]
fn segments_of_another_video_or_of_other_settings_are_not_used() {
    let folder = Folder::new();
    film(&folder, "a.mkv", &format!("{H264} -c:a aac -c:s srt"));
    let args = [&["a.mkv", "b.mkv"], &SECONDS[..]].concat();
    let task = |more: &[&'static str]| [&args[..], more, &["--segment", "2"]].concat();
    folder.succeeds(&task(&[]));
    for (more, difference) in [
        (&["--strength", "0.5"][..], "strength was 1, now 0.5"),
        (
            &["--encoder", "x265enc"],
            "encoder was default, now x265enc",
        ),
        (&["--denoise", "0.2"], "denoise was default, now 0.2"),
        (&["--duration", "5"], "segments was 6, "),
    ] {
        for args in [[&args[..], more].concat(), task(more)] {
            let said = folder.fails(&args);
            assert!(
                said.contains("b.mkv.segments") && said.contains(difference),
                "{said}"
            );
            assert!(said.contains("remove the folder"), "{said}");
        }
    }
    let said = folder.succeeds(&[&args[..], &["--overwrite", "--no-audio"]].concat());
    assert!(said.contains("1 of 6 segments are finished"), "{said}");
    // Another input of the same name.
    folder.succeeds(&[&args[..], &["--overwrite", "--segment", "2"]].concat());
    folder.ffmpeg(&format!(
        "-f lavfi -i testsrc=s=64x48:r=25:d=6 {H264} a.mkv"
    ));
    let said = folder.fails(&[&args[..], &["--overwrite", "--segment", "1"]].concat());
    assert!(said.contains("input was"), "{said}");
    let said = folder.succeeds(&[&args[..], &["--overwrite"]].concat());
    assert!(
        said.contains("input was") && said.contains("replaced"),
        "{said}"
    );
    assert!(said.contains("audio: none"), "{said}");
    assert!(!folder.path("b.mkv.segments").exists());
}

#[test]
fn a_damaged_segment_is_made_again() {
    let folder = Folder::new();
    film(&folder, "a.mkv", &format!("{H264} -c:a aac -c:s srt"));
    let args = |output, more: &[&'static str]| [&["a.mkv", output], &SECONDS[..], more].concat();
    folder.succeeds(&args("b.mkv", &[]));
    for number in ["1", "2", "3", "4", "5", "6"] {
        folder.succeeds(&args("c.mkv", &["--segment", number]));
    }
    let path = |number: u32| folder.path(&format!("c.mkv.segments/0000{number}.segment"));
    let bytes = fs::read(path(2)).unwrap();
    fs::write(path(2), &bytes[..bytes.len() / 2]).unwrap();
    let mut bytes = fs::read(path(5)).unwrap();
    bytes[200] ^= 1;
    fs::write(path(5), bytes).unwrap();
    fs::write(path(6), "").unwrap();
    let said = folder.fails(&args("c.mkv", &["--join"]));
    assert!(said.contains("these are missing: 2, 5, 6;"), "{said}");
    let said = folder.succeeds(&args("c.mkv", &["--segment", "2"]));
    assert!(said.contains("segment 2 is damaged"), "{said}");
    let said = folder.succeeds(&args("c.mkv", &[]));
    assert!(said.contains("segment 5 is damaged"), "{said}");
    assert!(said.contains("4 of 6 segments are finished"), "{said}");
    assert_eq!(
        content(&folder.path("b.mkv")),
        content(&folder.path("c.mkv"))
    );
}

#[cfg(unix)]
#[test]
fn a_stopped_film_keeps_its_segments_and_says_how_to_go_on() {
    let folder = Folder::new();
    film(&folder, "a.mkv", &format!("{H264} -c:a aac -c:s srt"));
    let args = [&["a.mkv", "b.mkv"], &SECONDS[..]].concat();
    let mut child = start(&folder, &args);
    wait_for(&mut child, &folder.path("b.mkv.segments/00001.segment"));
    // Another process is told to wait.
    let said = folder.fails(&args);
    assert!(said.contains("another process uses the folder"), "{said}");
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let said = fs::read_to_string(folder.path("stderr")).unwrap();
    assert!(
        said.contains("of 6 segments; the same command goes on"),
        "{said}"
    );
    let files = folder.files("b.mkv.segments");
    assert!(!files.iter().any(|name| name.starts_with('.')), "{files:?}");
    let said = folder.succeeds(&args);
    assert!(said.contains("of 6 segments are finished"), "{said}");
    assert!(!folder.path("b.mkv.segments").exists());
}

#[test]
fn a_film_that_is_damaged_midway_gives_what_is_there() {
    let folder = Folder::new();
    // The size changes after 3 s.
    for (name, size) in [("1.ts", "64x48"), ("2.ts", "96x64")] {
        folder.ffmpeg(&format!(
            "-f lavfi -i testsrc2=s={size}:r=25:d=3.2 {H264} {name}"
        ));
    }
    let parts = ["1.ts", "2.ts"].map(|name| fs::read(folder.path(name)).unwrap());
    fs::write(folder.path("a.ts"), parts.concat()).unwrap();
    let said = folder.fails(&[&["a.ts", "b.mkv"], &SECONDS[..]].concat());
    assert!(said.contains("the video changes from"), "{said}");
    assert!(said.contains("contains the 80 frames before"), "{said}");
    assert!(!folder.path("b.mkv").exists());
    assert_eq!(frames(&folder.path("b.partial.mkv")), 80);
}

#[test]
fn short_videos_have_no_segments() {
    let folder = Folder::new();
    folder.ffmpeg(&format!("{VIDEO} {H264} a.mkv"));
    let mut child = start(&folder, &["a.mkv", "b.mkv", "--strength", "0"]);
    wait_for(&mut child, &folder.path("b.partial.mkv"));
    assert!(!folder.path("b.mkv.segments").exists());
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_folder_of_pictures_and_videos_goes_on_after_a_broken_one() {
    let folder = Folder::new();
    fs::create_dir_all(folder.path("in/deep")).unwrap();
    folder.ffmpeg(&format!("{VIDEO} {TONE} {H264} in/a.mp4"));
    folder.ffmpeg(&format!("{VIDEO} {H264} in/deep/c.avi"));
    folder.ffmpeg("-f lavfi -i testsrc2=s=40x30 -frames:v 1 in/d.png");
    fs::write(folder.path("in/b.mp4"), "no video").unwrap();
    fs::write(folder.path("in/notes.txt"), "no video").unwrap();
    let args = |more: &[&'static str]| [&["in", "out"], &SECONDS[..], more].concat();
    let (success, out, err) = folder.upscale(&args(&[]));
    assert!(!success && err.contains("skipped 'in/notes.txt'"), "{err}");
    assert!(
        err.contains("1 video could not be upscaled") && err.contains("in/b.mp4"),
        "{err}"
    );
    assert!(out.contains("out: 1 of 1 pictures"), "{out}");
    assert!(out.contains("2 of 3 videos"), "{out}");
    let made = ["a.mp4", "d.png", "deep/c.mkv"];
    assert_eq!(folder.files("out"), made);
    for video in ["out/a.mp4", "out/deep/c.mkv"] {
        assert_eq!(frames(&folder.path(video)), 150, "{video}");
    }
    let said = folder.fails(&args(&[]));
    assert!(
        said.contains("exists") && said.contains("--skip-existing"),
        "{said}"
    );
    fs::remove_file(folder.path("in/b.mp4")).unwrap();
    fs::remove_file(folder.path("out/a.mp4")).unwrap();
    let said = folder.succeeds(&args(&["--skip-existing", "--json"]));
    let last: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let fields = ["event", "pictures", "videos", "of", "existing"].map(|name| &last[name]);
    assert_eq!(
        fields.map(|value| value.to_string()),
        ["\"done\"", "0", "1", "3", "2"]
    );
    assert!(
        said.contains("{\"event\":\"video\",\"path\":\"out/a.mp4\",\"frames\":150"),
        "{said}"
    );
    assert_eq!(folder.files("out"), made);
    let said = folder.fails(&args(&["--join"]));
    assert!(said.contains("--join is for one video"), "{said}");
    // Two inputs with one output.
    fs::write(folder.path("in/deep/c.mkv"), "no video").unwrap();
    let said = folder.fails(&args(&["--overwrite"]));
    assert!(said.contains("would both become 'deep/c.mkv'"), "{said}");
}

#[cfg(target_os = "linux")]
#[test]
#[ignore = "mounts a file system, which needs root"]
fn a_full_disk_is_an_error_that_says_how_to_go_on() {
    let folder = Folder::new();
    film(&folder, "a.mkv", &format!("{H264} -c:a aac -c:s srt"));
    folder.succeeds(&[&["a.mkv", "b.mkv"], &SECONDS[..]].concat());
    let (size, small) = (fs::metadata(folder.path("b.mkv")).unwrap().len(), "small");
    fs::create_dir(folder.path(small)).unwrap();
    let mount = |args: &[&str]| {
        let mounted = Command::new("mount")
            .args(args)
            .arg(folder.path(small))
            .status();
        assert!(mounted.unwrap().success(), "{args:?}");
    };
    let args = [&["a.mkv", "small/b.mkv"], &SECONDS[..]].concat();
    // Space for some segments, and then for all of them but not for the output.
    mount(&["-t", "tmpfs", "-o", &format!("size={}", size / 2), "tmpfs"]);
    let halves = folder.fails(&args);
    mount(&["-o", &format!("remount,size={}", 3 * size / 2)]);
    let joined = folder.fails(&args);
    mount(&["-o", "remount,size=100m"]);
    let said = folder.succeeds(&args);
    let made = content(&folder.path("small/b.mkv"));
    let left = folder.files(small);
    let unmounted = Command::new("umount").arg(folder.path(small)).status();
    assert!(unmounted.unwrap().success());
    for said in [halves, joined] {
        let said = said.to_lowercase();
        assert!(said.contains("no space left"), "{said}");
        assert!(said.contains("the same command goes on"), "{said}");
    }
    assert!(said.contains("6 of 6 segments are finished"), "{said}");
    assert_eq!(made, content(&folder.path("b.mkv")));
    assert_eq!(left, ["b.mkv"]);
}
