//! Sound: what is copied, re-encoded and said.

use std::{path::Path, process::Command};

use crate::{Clips, TONE, VIDEO, audio_codec, complete, ffprobe::ffprobe, times};

#[test]
fn audio_that_the_container_does_not_take_is_re_encoded_and_said() {
    let clips = Clips::new();
    for (name, codec, to) in [
        ("eac3.mkv", "-c:a eac3", "eac3.mp4"),
        ("latm.ts", "-c:a aac -mpegts_flags latm", "latm.mp4"),
        ("adpcm.avi", "-c:a adpcm_ima_wav -ar 44100", "adpcm.mp4"),
        ("pcm.mov", "-c:a pcm_s16be", "pcm.webm"),
    ] {
        let from = clips.make(name, &format!("{VIDEO} {TONE} -c:v libx264 {codec}"));
        let to = clips.path(to);
        let told = complete(&from, &to);
        // GStreamer 1.28 takes E-AC-3 in MP4.
        let is_copied = audio_codec(&to) == audio_codec(&from) && name != "latm.ts";
        let is_said = told.iter().any(|line| line.contains("re-encoded"));
        assert!(
            is_said != is_copied,
            "{name}: {told:?}, {}",
            audio_codec(&to)
        );
        assert_eq!(times(&to, "v").len(), 50, "{name}");
        let audio = times(&to, "a");
        let length = audio[audio.len() - 1] - audio[0];
        // The parser needs the second configuration of LATM.
        let shortest = if name == "latm.ts" { 1.6 } else { 1.9 };
        assert!(
            (shortest..2.1).contains(&length),
            "{name}: {length} s of audio"
        );
    }
}

#[test]
fn channels_that_the_encoder_lacks_are_said() {
    let clips = Clips::new();
    let sound = "-f lavfi -i anullsrc=r=48000:cl=7.1:d=2 -c:v libx264 -c:a flac";
    let from = clips.make("in.mkv", &format!("{VIDEO} {sound}"));
    let told = complete(&from, &clips.path("out.mp4"));
    // Another encoder may have 8 channels.
    let is_said = told.iter().any(|line| line.contains("8 channels become 6"));
    let is_needed = told.iter().any(|line| line.contains("by avenc_aac"));
    assert!(is_said || !is_needed, "{told:?}");
}

#[test]
fn an_unknown_language_does_not_become_english() {
    let clips = Clips::new();
    let from = clips.make("in.mp4", &format!("{VIDEO} {TONE} -c:v libx264 -c:a aac"));
    let to = clips.path("out.mkv");
    complete(&from, &to);
    let tags = ["-select_streams", "a", "-show_entries", "stream_tags"];
    assert!(!ffprobe(&to, &tags).contains("eng"));
}

#[test]
fn re_encoded_audio_of_low_rates_is_complete() {
    let clips = Clips::new();
    for rate in [8000, 11_025] {
        let args = format!("{VIDEO} {TONE} -c:v libx264 -c:a adpcm_ima_wav -ar {rate}");
        let from = clips.make(&format!("{rate}.avi"), &args);
        complete(&from, &clips.path(&format!("{rate}.mp4")));
    }
}

/// Writes a mono WAV file of 2 s with two clicks. Returns their times.
fn write_clicks(path: &Path, rate: u32) -> [f64; 2] {
    let clicks = [0.1, 1.0];
    let mut samples = vec![0_i16; 2 * rate as usize];
    for time in clicks {
        let start = (time * f64::from(rate)) as usize;
        for (i, sample) in samples[start..start + 24].iter_mut().enumerate() {
            *sample = if i % 8 < 4 { 20_000 } else { -20_000 };
        }
    }
    let bytes = 2 * samples.len() as u32;
    let mut file = b"RIFF".to_vec();
    file.extend((36 + bytes).to_le_bytes());
    file.extend(b"WAVEfmt ");
    file.extend(16_u32.to_le_bytes());
    file.extend([1_u16, 1].map(u16::to_le_bytes).concat());
    file.extend([rate, 2 * rate].map(u32::to_le_bytes).concat());
    file.extend([2_u16, 16].map(u16::to_le_bytes).concat());
    file.extend(b"data");
    file.extend(bytes.to_le_bytes());
    file.extend(samples.iter().flat_map(|v| v.to_le_bytes()));
    std::fs::write(path, file).unwrap();
    clicks
}

#[test]
fn re_encoded_audio_is_in_sync_to_5_ms_and_whole() {
    let clips = Clips::new();
    for (rate, start) in [(48_000, 0.0), (44_100, 0.0), (48_000, 0.5)] {
        let clicks = write_clicks(&clips.path("c.wav"), rate);
        let name = format!("in{rate}-{start}.mov");
        let args = format!("{VIDEO} -itsoffset {start} -i c.wav -c:v libx264 -bf 0 -c:a pcm_u8");
        let from = clips.make(&name, &args);
        for extension in ["mp4", "mov", "mkv", "webm"] {
            let to = clips.path(&format!("{name}.{extension}"));
            let told = complete(&from, &to);
            let is_copied = !told.iter().any(|line| line.contains("re-encoded"));
            // GStreamer's muxer gives the first packet of Opus that begins late another offset than
            // the rest, by which ffmpeg places the whole stream.
            if is_copied || (extension == "webm" && start > 0.0) {
                continue;
            }
            let output = Command::new("ffmpeg")
                .args(["-v", "error", "-copyts", "-i"])
                .arg(&to)
                .args([
                    "-map",
                    "0:a",
                    "-af",
                    "aresample=48000:async=1:first_pts=0",
                    "-ac",
                    "1",
                ])
                .args(["-f", "s16le", "-"])
                .output()
                .unwrap();
            let samples = output.stdout.as_chunks::<2>().0.iter();
            let samples: Vec<i16> = samples.map(|v| i16::from_le_bytes(*v)).collect();
            let seconds = samples.len() as f64 / 48_000.0;
            assert!((seconds - start - 2.0).abs() < 0.03, "{to:?}: {seconds} s");
            for time in clicks {
                let near = ((start + time - 0.09) * 48_000.0) as usize;
                let near = &samples[near..near + 8640];
                let peak = near.iter().map(|v| v.unsigned_abs()).max().unwrap();
                let click = near
                    .iter()
                    .position(|v| v.unsigned_abs() > peak / 2)
                    .unwrap();
                let late = click as f64 / 48_000.0 - 0.09;
                assert!(peak > 2000, "{to:?}: no click at {time} s");
                assert!(late.abs() < 0.005, "{to:?}: {late} s late");
            }
        }
    }
}

#[test]
fn a_copied_packet_that_is_partly_shown_is_kept() {
    let clips = Clips::new();
    let packets = |path: &Path| times(path, "a").len();
    // The encoder of AC-3 has a delay of 256 samples, with which its first packet begins before the
    // video.
    for name in ["in.mp4", "in.ts", "in.mkv"] {
        let from = clips.make(name, &format!("{VIDEO} {TONE} -c:v libx264 -c:a ac3"));
        for extension in ["mp4", "mkv"] {
            let to = clips.path(&format!("{name}.{extension}"));
            complete(&from, &to);
            assert_eq!(audio_codec(&to), "ac3");
            assert_eq!(packets(&to), packets(&from), "{to:?}");
        }
    }
}
