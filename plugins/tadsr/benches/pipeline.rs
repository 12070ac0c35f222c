// SPDX-License-Identifier: MPL-2.0

//! Benchmarks of the element in real pipelines: frames per second from an H.264 file to a fake sink
//! and PSNR-Y, compared with videoscale and ffmpeg (if installed); overhead of the element over the
//! engine alone; peak memory of a pipeline.
//!
//! ```text
//! cargo bench -p gst-plugin-tadsr --bench pipeline [-- TRUTH.mp4 [WORK]]
//! ```
//! TRUTH is a clip of at least 1280x720. It is downscaled, encoded as H.264 and upscaled again;
//! `benches/pipeline.sh` creates one. Each pipeline has two threads for the decoder and two for the
//! scaler: on a machine with more cores, run it under `taskset -c 0,1`. The result is the best of
//! several runs, because disturbances only add time.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, Mutex},
    time::Instant,
};

use gst::prelude::*;
use tadsr::{
    Device, Upscaler,
    frame::{Frame, FrameInfo, PixelFormat},
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const RUNS: usize = 3;

/// Frames per clip, and per run of the engine alone.
const FRAMES: usize = 150;

/// Runs a pipeline to its end. Returns the seconds between the first and the last buffer at the
/// element `sink`, and their number.
fn run(description: &str) -> Result<(f64, usize)> {
    let pipeline = gst::parse::launch(description)?;
    let pipeline = pipeline
        .downcast::<gst::Pipeline>()
        .map_err(|_| "no pipeline")?;
    let seen = Arc::new(Mutex::new((None, Instant::now(), 0)));
    let pad = pipeline.by_name("sink").and_then(|s| s.static_pad("sink"));
    let counted = seen.clone();
    pad.ok_or("no sink")?
        .add_probe(gst::PadProbeType::BUFFER, move |_, _| {
            if let Ok(mut seen) = counted.lock() {
                let now = Instant::now();
                *seen = (seen.0.or(Some(now)), now, seen.2 + 1);
            }
            gst::PadProbeReturn::Ok
        });
    let end = play(&pipeline);
    pipeline.set_state(gst::State::Null)?;
    end?;
    let seen = seen.lock().map_err(|_| "a probe panicked")?;
    let seconds = seen.0.map_or(0.0, |first| (seen.1 - first).as_secs_f64());
    Ok((seconds, seen.2))
}

fn play(pipeline: &gst::Pipeline) -> Result<()> {
    let bus = pipeline.bus().ok_or("no bus")?;
    pipeline.set_state(gst::State::Playing)?;
    for message in bus.iter_timed(gst::ClockTime::NONE) {
        match message.view() {
            gst::MessageView::Eos(_) => return Ok(()),
            gst::MessageView::Error(e) => {
                return Err(format!("{}: {:?}", e.error(), e.debug()).into());
            }
            _ => {}
        }
    }
    Err("the bus is closed".into())
}

/// Returns the frames per second at the end of a pipeline, the best of several runs.
fn fps(description: &str) -> Result<f64> {
    let mut best = 0.0f64;
    for _ in 0..RUNS {
        let (seconds, frames) = run(description)?;
        best = best.max((frames.max(1) - 1) as f64 / seconds);
    }
    Ok(best)
}

fn decoder(file: &Path) -> String {
    let file = file.display();
    format!("filesrc location={file} ! qtdemux ! h264parse ! avdec_h264 max-threads=2")
}

/// Encodes `truth` at `width` x `height`, unless the file exists.
fn small(truth: &Path, work: &Path, width: usize, height: usize) -> Result<PathBuf> {
    let path = work.join(format!("{width}x{height}.mp4"));
    if !path.exists() {
        let part = work.join("part.mp4");
        run(&format!(
            "filesrc location={} ! decodebin ! videoconvert ! \
             videoscale method=lanczos n-threads=2 ! \
             video/x-raw,format=I420,width={width},height={height} ! \
             identity name=sink eos-after={} ! x264enc pass=quant quantizer=18 ! \
             h264parse ! mp4mux ! filesink location={}",
            truth.display(),
            FRAMES + 1,
            part.display(),
        ))?;
        fs::rename(part, &path)?;
    }
    Ok(path)
}

/// Returns the luma of all frames of a pipeline.
fn luma(source: &str, (width, height): (usize, usize), work: &Path) -> Result<Vec<u8>> {
    let raw = work.join("luma.raw");
    run(&format!(
        "{source} ! videoconvert ! video/x-raw,format=I420,width={width},height={height} ! \
         filesink name=sink location={}",
        raw.display()
    ))?;
    let bytes = fs::read(&raw)?;
    fs::remove_file(&raw)?;
    Ok(luma_of(&bytes, (width, height)))
}

/// Returns the luma of frames in I420.
fn luma_of(frames: &[u8], (width, height): (usize, usize)) -> Vec<u8> {
    let frames = frames.chunks_exact(width * height * 3 / 2);
    frames.flat_map(|f| &f[..width * height]).copied().collect()
}

/// Returns the frames per second of an ffmpeg filter on two threads, and its PSNR-Y.
///
/// # Errors
/// Returns the last line of ffmpeg's log.
fn ffmpeg(file: &Path, options: &[&str], filter: &str, truth: &[u8]) -> Result<(f64, f64)> {
    let call = |output: &[&str]| -> Result<Output> {
        let output = Command::new("ffmpeg")
            .args(["-v", "info", "-hide_banner", "-nostats", "-benchmark"])
            .args(options)
            .args(["-threads", "2", "-i"])
            .arg(file)
            .args(["-vf", filter, "-filter_threads", "2"])
            .args(output)
            .output()?;
        if output.status.success() {
            Ok(output)
        } else {
            let text = String::from_utf8_lossy(&output.stderr);
            Err(text.lines().last().unwrap_or_default().into())
        }
    };
    let raw = call(&["-pix_fmt", "yuv420p", "-f", "rawvideo", "-"])?.stdout;
    let luma = luma_of(&raw, (1280, 720));
    let frames = luma.len() / (1280 * 720);
    let mut best = 0.0f64;
    for _ in 0..RUNS {
        let text = call(&["-f", "null", "-"])?.stderr;
        let text = String::from_utf8_lossy(&text);
        let seconds = text
            .split("rtime=")
            .nth(1)
            .and_then(|t| t.split('s').next());
        let seconds: f64 = seconds.ok_or("ffmpeg prints no time")?.parse()?;
        best = best.max(frames as f64 / seconds);
    }
    Ok((best, psnr(&luma, truth)))
}

/// Returns the PSNR of the frames that exist in both.
fn psnr(a: &[u8], b: &[u8]) -> f64 {
    let pairs = a.iter().zip(b);
    let squares: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
    let mean = squares as f64 / a.len().min(b.len()).max(1) as f64;
    10.0 * (255.0 * 255.0 / mean).log10()
}

/// Returns the frames per second of the engine alone, and of the element between a trivial source
/// and sink, measured in turn.
fn engine_and_element() -> Result<(f64, f64)> {
    let info = FrameInfo::new(PixelFormat::I420, 640, 360);
    let frame = Frame::new(info)?;
    let mut out = Frame::new(info.with_size(1280, 720))?;
    let mut upscaler = Upscaler::load("", Device::Cpu)?;
    upscaler.set_threads(2)?;
    let (mut engine, mut element) = (0.0f64, 0.0f64);
    for _ in 0..2 * RUNS {
        upscaler.upscale_into(&frame.as_ref(), &mut out.as_mut())?;
        let start = Instant::now();
        for _ in 0..FRAMES {
            upscaler.upscale_into(&frame.as_ref(), &mut out.as_mut())?;
        }
        engine = engine.max(FRAMES as f64 / start.elapsed().as_secs_f64());
        let (seconds, frames) = run(&format!(
            "videotestsrc num-buffers=1 ! video/x-raw,format=I420,width=640,height=360 ! \
             imagefreeze num-buffers={FRAMES} ! tadsrupscale model=tiny threads=2 ! \
             fakevideosink name=sink sync=false"
        ))?;
        element = element.max((frames.max(1) - 1) as f64 / seconds);
    }
    Ok((engine, element))
}

/// Returns the peak memory in MB of a child process that runs a pipeline.
fn memory(description: &str) -> Result<f64> {
    let child = Command::new(env::current_exe()?)
        .args(["--memory", description])
        .output()?;
    if !child.status.success() {
        return Err(String::from_utf8_lossy(&child.stderr).into_owned().into());
    }
    Ok(String::from_utf8(child.stdout)?.trim().parse()?)
}

/// Returns the peak memory of this process in MB.
fn peak() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0 / 1e6)
}

fn main() -> Result<()> {
    gst::init()?;
    gsttadsr::plugin_register_static()?;
    let args: Vec<String> = env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [flag, description] = &args[..]
        && flag == "--memory"
    {
        run(description)?;
        println!("{}", peak()?);
        return Ok(());
    }
    let (engine, element) = engine_and_element()?;
    println!(
        "640x360 to 1280x720, precision=auto, 2 threads: engine {engine:.1} fps, \
         element {element:.1} fps, ratio {:.3}",
        element / engine
    );
    let Some(truth) = args.first().map(PathBuf::from) else {
        println!("pass a clip for more measurements, see the top of this file");
        return Ok(());
    };
    let work = args.get(1).map_or_else(env::temp_dir, PathBuf::from);
    fs::create_dir_all(&work)?;
    let sink = "fakevideosink name=sink sync=false";

    let encoded = small(&truth, &work, 640, 360)?;
    let source = decoder(&encoded);
    let size = "video/x-raw,width=1280,height=720";
    let truth_luma = luma(
        &format!(
            "filesrc location={} ! decodebin ! videoconvert ! videoscale method=lanczos",
            truth.display()
        ),
        (1280, 720),
        &work,
    )?;
    println!("\n640x360 H.264 to 1280x720 into fakevideosink");
    println!("{:52} {:>7} {:>8}", "", "fps", "PSNR-Y");
    println!(
        "{:52} {:7.1}",
        "decoder alone",
        fps(&format!("{source} ! {sink}"))?
    );
    let scalers = ["bilinear", "4-tap", "lanczos"]
        .map(|m| format!("videoscale n-threads=2 method={m} ! {size}"));
    let ours = [
        "strength=0",
        "precision=f32",
        "precision=bf16",
        "precision=int8",
        "precision=auto",
        "denoise=0",
    ];
    let ours = ours.map(|p| format!("tadsrupscale model=tiny threads=2 {p} ! {size}"));
    for scaler in scalers.iter().chain(&ours) {
        let name = scaler.trim_end_matches(&format!(" ! {size}"));
        let rate = fps(&format!("{source} ! {scaler} ! {sink}"))?;
        let decibels = psnr(
            &luma(&format!("{source} ! {scaler}"), (1280, 720), &work)?,
            &truth_luma,
        );
        println!("{name:52} {rate:7.1} {decibels:8.3}");
    }
    let placebo = "format=yuv420p,hwupload,libplacebo=w=1280:h=720:upscaler=ewa_lanczos,\
                   hwdownload,format=yuv420p";
    let peers: [(_, _, &[&str]); 4] = [
        ("scale=flags=bicubic", "scale=1280:720:flags=bicubic", &[]),
        ("scale=flags=lanczos", "scale=1280:720:flags=lanczos", &[]),
        (
            "zscale=filter=lanczos",
            "zscale=1280:720:filter=lanczos",
            &[],
        ),
        (
            "libplacebo ewa_lanczos",
            placebo,
            &["-init_hw_device", "vulkan"],
        ),
    ];
    for (name, filter, options) in peers {
        let name = format!("ffmpeg {name}");
        match ffmpeg(&encoded, options, filter, &truth_luma) {
            Ok((rate, decibels)) => println!("{name:52} {rate:7.1} {decibels:8.3}"),
            Err(e) => println!("{name:52} skipped: {e}"),
        }
    }

    let source = decoder(&small(&truth, &work, 960, 540)?);
    let total = memory(&format!(
        "{source} ! tadsrupscale model=tiny threads=2 ! video/x-raw,width=1920,height=1080 ! {sink}"
    ))?;
    let without = memory(&format!("{source} ! {sink}"))?;
    println!(
        "\n960x540 H.264 to 1920x1080: peak of {total:.0} MB, {without:.0} MB without tadsrupscale"
    );
    Ok(())
}
