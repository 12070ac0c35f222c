//! Dry runs: a few steps, and what they say about the whole run.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::Result;
use indicatif::{HumanBytes, HumanDuration};

use crate::{run::Training, stop::Stopped};

/// Steps that are timed, after one that is not.
const STEPS: u32 = 3;

/// Times some steps of a stage of `steps` steps; gives the time of all. Ends in [`Stopped`] where `stop` asks for it.
pub fn stage(
    name: &str,
    run: &mut impl Training,
    steps: u64,
    stop: &AtomicBool,
) -> Result<Duration> {
    let mut step = || match stop.load(Ordering::SeqCst) {
        true => Err(anyhow::Error::from(Stopped("stopped".into()))),
        false => Ok(run.step().map(|_| ())?),
    };
    step()?;
    let start = Instant::now();
    for _ in 0..STEPS {
        step()?;
    }
    let step = start.elapsed() / STEPS;
    let whole = step.mul_f64(steps as f64);
    println!(
        "{name}: {:.3} s a step, {steps} steps: about {}",
        step.as_secs_f64(),
        HumanDuration(whole)
    );
    Ok(whole)
}

/// Says what all stages take together.
pub fn summary(whole: Duration) {
    println!("in all: about {}", HumanDuration(whole));
    if let Some(peak) = peak_memory() {
        println!("memory at its peak: {}", HumanBytes(peak));
    }
    println!("nothing was written but clips in the cache, where videos or codecs are used");
}

/// The most memory that this process has had, in bytes, where the system says so.
pub fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string(Path::new("/proc/self/status")).ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(1024 * kilobytes)
}
