//! Subtitles and what streams are marked as.

use std::{path::Path, process::Command};

use crate::{Clips, TONE, VIDEO, complete, ffprobe::ffprobe};

/// Returns the subtitles of `path` as SubRip text, with the number of the stream among subtitles.
fn subtitles(path: &Path, stream: usize) -> String {
    let output = Command::new("ffmpeg")
        .args(["-v", "error", "-i"])
        .arg(path)
        .args(["-map", &format!("0:s:{stream}"), "-f", "srt", "-"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{path:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().replace('\r', "")
}

#[test]
fn overlapping_subtitles_lose_no_text() {
    let clips = Clips::new();
    let cue = |n, times, text| format!("{n}\n{times}\n{text}\n\n");
    let cues = [
        cue(1, "00:00:00,200 --> 00:00:01,800", "Sign"),
        cue(2, "00:00:00,600 --> 00:00:01,000", "One"),
        cue(3, "00:00:00,600 --> 00:00:01,100", "Two"),
    ];
    std::fs::write(clips.path("s.srt"), cues.concat()).unwrap();
    let from = clips.make("in.mkv", &format!("{VIDEO} -i s.srt -c:v libx264 -c:s ass"));
    for name in ["out.mp4", "out.mov"] {
        let to = clips.path(name);
        let told = complete(&from, &to);
        assert!(told.iter().any(|line| line.contains("overlap")), "{told:?}");
        let text = subtitles(&to, 0);
        let one = text.split_once("00:00:00,200 --> 00:00:00,600\n");
        let (_, rest) = one.unwrap_or_else(|| panic!("{text}"));
        let two = rest.split_once("00:00:00,600 --> 00:00:01,100\n");
        let (sign, both) = two.unwrap_or_else(|| panic!("{text}"));
        assert!(sign.contains("Sign") && both.contains("One\nTwo"), "{text}");
    }
}

const SUBRIP: &str = "1\n00:00:00,200 --> 00:00:00,700\nYou & <i>me</i>\n\n\
                      2\n00:00:01,000 --> 00:00:01,500\nTwo\nlines\n\n";

#[test]
fn subtitles_go_into_every_container_that_holds_them() {
    let clips = Clips::new();
    std::fs::write(clips.path("s.srt"), SUBRIP).unwrap();
    let args = |codec: &str| {
        format!(
            "{VIDEO} -i s.srt -map 0 -map 1 -map 1 -c:v libx264 -bf 0 -c:s {codec} \
             -metadata:s:s:0 language=deu -metadata:s:s:1 language=fra"
        )
    };
    for (name, codec) in [
        ("text.mkv", "srt"),
        ("ass.mkv", "ass"),
        ("vtt.mkv", "webvtt"),
        ("tx3g.mp4", "mov_text"),
    ] {
        let from = clips.make(name, &args(codec));
        for extension in ["mkv", "mp4", "mov"] {
            let to = clips.path(&format!("{name}.{extension}"));
            let told = complete(&from, &to);
            for stream in 0..2 {
                let text = subtitles(&to, stream);
                for part in [
                    "00:00:00,200 --> 00:00:00,700",
                    "00:00:01,000 --> 00:00:01,500",
                ] {
                    assert!(text.contains(part), "{to:?}: {text}");
                }
                assert!(
                    text.contains("You & ") && text.contains("me"),
                    "{to:?}: {text}"
                );
                assert!(text.contains("Two\nlines"), "{to:?}: {text}");
            }
            let entries = "stream_tags=language";
            let languages = ffprobe(&to, &["-select_streams", "s", "-show_entries", entries]);
            let languages = languages.replace("de\n", "ger\n").replace("deu", "ger");
            let languages = languages.replace("fr\n", "fre\n").replace("fra", "fre");
            assert_eq!(languages.trim(), "ger\nfre", "{to:?}");
            let style_kept = subtitles(&to, 0).contains("<i>me</i>");
            let said = told.iter().any(|line| line.contains("subtitles 1"));
            assert!(style_kept || said || name == "tx3g.mp4", "{to:?}: {told:?}");
        }
        let told = complete(&from, &clips.path(&format!("{name}.webm")));
        let said = |n| {
            told.iter()
                .any(|line| line.contains(n) && line.contains("left out"))
        };
        assert!(said("subtitles 1") && said("subtitles 2"), "{told:?}");
    }
}

#[test]
fn styled_subtitles_keep_their_style_and_fonts_in_matroska() {
    let clips = Clips::new();
    std::fs::write(clips.path("s.srt"), SUBRIP).unwrap();
    std::fs::write(clips.path("font.ttf"), [7; 3000]).unwrap();
    let from = clips.make(
        "in.mkv",
        &format!(
            "{VIDEO} -i s.srt -map 0 -map 1 -c:v libx264 -c:s ass -attach font.ttf \
             -metadata:s:t mimetype=font/ttf"
        ),
    );
    let hashes = |path: &Path, entries: &str| {
        let args = ["-show_data_hash", "md5", "-select_streams", "s"];
        ffprobe(path, &[&args[..], &["-show_entries", entries]].concat())
    };
    let to = clips.path("out.mkv");
    complete(&from, &to);
    for entries in [
        "packet=pts_time,duration_time,data_hash",
        "stream=codec_name,extradata_hash",
    ] {
        assert_eq!(hashes(&from, entries), hashes(&to, entries));
    }
    let fonts = |path: &Path| {
        let entries = "stream=extradata_hash:stream_tags=filename,mimetype";
        let args = [
            "-show_data_hash",
            "md5",
            "-select_streams",
            "t",
            "-show_entries",
            entries,
        ];
        ffprobe(path, &args)
    };
    assert!(fonts(&from).contains("font.ttf"), "{}", fonts(&from));
    assert_eq!(fonts(&from), fonts(&to));
    let told = complete(&from, &clips.path("out.mp4"));
    let said = |text| told.iter().any(|line| line.contains(text));
    assert!(said("font.ttf") && said("subtitles 1 (ASS)"), "{told:?}");
}

#[test]
fn marks_of_streams_are_kept_in_matroska_and_otherwise_said() {
    let clips = Clips::new();
    std::fs::write(clips.path("s.srt"), SUBRIP).unwrap();
    let from = clips.make(
        "in.mkv",
        &format!(
            "{VIDEO} {TONE} {TONE} -i s.srt -map 0 -map 1 -map 2 -map 3 -map 3 -c:v libx264 -c:a aac -c:s srt \
             -disposition:a:0 comment -disposition:a:1 default -disposition:s:0 0 -disposition:s:1 forced"
        ),
    );
    // They are printed in the order of ffprobe.
    let flags = "stream_disposition=default,comment,forced";
    let marks =
        |path: &Path, kind| ffprobe(path, &["-select_streams", kind, "-show_entries", flags]);
    assert_eq!(marks(&from, "a"), "0,1,0\n1,0,0\n");
    assert_eq!(marks(&from, "s"), "0,0,0\n0,0,1\n");
    let said = |told: &[String]| told.iter().any(|line| line.contains("marks"));
    let to = clips.path("out.mkv");
    assert!(!said(&complete(&from, &to)));
    for kind in ["a", "s"] {
        assert_eq!(marks(&to, kind), marks(&from, kind), "{kind}");
    }
    assert!(said(&complete(&from, &clips.path("out.mp4"))));
    // That a single stream of sound is not the default means nothing.
    let args = format!("{VIDEO} {TONE} -c:v libx264 -c:a aac -disposition:a:0 0");
    let from = clips.make("one.mkv", &args);
    assert!(!said(&complete(&from, &clips.path("one.mp4"))));
}
