// SPDX-License-Identifier: MPL-2.0

//! Tests of the element in real pipelines.

use std::{
    process::Command,
    sync::{Arc, Mutex},
};

use crate::common::init;
use gst::prelude::*;

/// Sizes and frames that passed a pad.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    sizes: Vec<(i32, i32)>,
    times: Vec<Option<gst::ClockTime>>,
}

/// Records every frame that passes `pad`, and each new size.
fn watch(pad: &gst::Pad) -> Arc<Mutex<Seen>> {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let notes = seen.clone();
    let kinds = gst::PadProbeType::BUFFER | gst::PadProbeType::EVENT_DOWNSTREAM;
    pad.add_probe(kinds, move |_, probe| {
        let mut notes = notes.lock().unwrap();
        match &probe.data {
            Some(gst::PadProbeData::Buffer(buffer)) => notes.times.push(buffer.pts()),
            Some(gst::PadProbeData::Event(event)) => {
                if let gst::EventView::Caps(caps) = event.view() {
                    let s = caps.caps().structure(0).unwrap();
                    notes
                        .sizes
                        .push((s.get("width").unwrap(), s.get("height").unwrap()));
                }
            }
            _ => {}
        }
        gst::PadProbeReturn::Ok
    });
    seen
}

/// Runs a pipeline with an element named `up` to its end. Returns the input and output of the
/// element, or the error.
fn run(description: &str) -> Result<(Seen, Seen), String> {
    init();
    // Otherwise an error would leak the elements.
    let fatal = gst::ParseFlags::FATAL_ERRORS;
    let pipeline = gst::parse::launch_full(description, None, fatal);
    let pipeline = pipeline.map_err(|err| err.to_string())?;
    let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
    let up = pipeline.by_name("up").unwrap();
    let before = watch(&up.static_pad("sink").unwrap());
    let after = watch(&up.static_pad("src").unwrap());

    let result = play(&pipeline);
    pipeline.set_state(gst::State::Null).unwrap();
    result?;
    let seen = (
        before.lock().unwrap().clone(),
        after.lock().unwrap().clone(),
    );
    Ok(seen)
}

fn play(pipeline: &gst::Pipeline) -> Result<(), String> {
    // A message describes why the start failed.
    let _ = pipeline.set_state(gst::State::Playing);
    let kinds = [gst::MessageType::Eos, gst::MessageType::Error];
    let limit = gst::ClockTime::from_seconds(120);
    let message = pipeline.bus().unwrap().timed_pop_filtered(limit, &kinds);
    match message.as_ref().map(|m| m.view()) {
        Some(gst::MessageView::Error(error)) => Err(format!(
            "{} {}",
            error.error(),
            error.debug().unwrap_or_default()
        )),
        Some(_) => Ok(()),
        None => Err("the pipeline hangs".into()),
    }
}

#[test]
fn upstream_produces_the_output_size_divided_by_the_scale() {
    let (before, after) = run("videotestsrc num-buffers=3 ! tadsrupscale name=up scale=4 \
         ! video/x-raw,width=640,height=480 ! fakesink")
    .unwrap();
    assert_eq!(before.sizes, [(160, 120)]);
    assert_eq!(after.sizes, [(640, 480)]);
    assert_eq!(after.times.len(), 3);
}

#[test]
fn an_impossible_size_is_an_error() {
    // Detected when the elements are linked,
    let error = run("videotestsrc num-buffers=3 ! tadsrupscale name=up scale=4 \
         ! video/x-raw,width=641,height=480 ! fakesink")
    .unwrap_err();
    assert!(error.contains("width=(int)641"), "{error}");
    // or during negotiation.
    init();
    let pipeline = gst::parse::launch(
        "videotestsrc num-buffers=3 ! tadsrupscale scale=4 ! capsfilter name=wanted ! fakesink",
    )
    .unwrap();
    let pipeline = pipeline.downcast::<gst::Pipeline>().unwrap();
    let wanted = pipeline.by_name("wanted").unwrap();
    wanted.set_property_from_str("caps", "video/x-raw,width=641,height=480");
    let error = play(&pipeline).unwrap_err();
    pipeline.set_state(gst::State::Null).unwrap();
    assert!(error.contains("not-negotiated"), "{error}");
}

#[test]
fn the_size_comes_from_downstream_or_doubles() {
    let (before, after) = run("videotestsrc num-buffers=2 ! video/x-raw,format=NV12 \
         ! tadsrupscale name=up ! fakesink")
    .unwrap();
    assert_eq!(before.sizes, [(320, 240)]);
    assert_eq!(after.sizes, [(640, 480)]);

    let (_, after) = run(
        "videotestsrc num-buffers=2 ! video/x-raw,width=256,height=144 \
         ! tadsrupscale name=up ! video/x-raw,width=640,height=360 ! fakesink",
    )
    .unwrap();
    assert_eq!(after.sizes, [(640, 360)]);

    let (before, after) = run("videotestsrc num-buffers=2 ! tadsrupscale name=up \
         ! video/x-raw,height=600 ! fakesink")
    .unwrap();
    assert_eq!(before.sizes, [(320, 240)]);
    assert_eq!(after.sizes, [(800, 600)]);
}

#[test]
fn every_decoded_frame_is_upscaled_with_its_timestamp() {
    let (before, after) = run(
        "videotestsrc num-buffers=30 ! video/x-raw,format=I420,width=160,height=120,framerate=25/1 \
         ! x264enc bframes=2 speed-preset=ultrafast ! h264parse ! avdec_h264 \
         ! tadsrupscale name=up scale=2 ! videoconvert ! fakesink",
    )
    .unwrap();
    assert_eq!(before.times.len(), 30);
    assert_eq!(after.times, before.times);
    assert_eq!(after.sizes, [(320, 240)]);
}

#[test]
fn an_encoded_result_decodes_to_all_frames() {
    let directory = tempfile::tempdir().unwrap();
    let film = directory.path().join("film.mp4");
    let film = film.to_str().unwrap();
    let (before, _) = run(&format!(
        "videotestsrc num-buffers=20 ! video/x-raw,format=NV12,width=96,height=64 \
         ! tadsrupscale name=up ! x264enc speed-preset=ultrafast ! h264parse ! mp4mux \
         ! filesink location={film}"
    ))
    .unwrap();
    assert_eq!(before.times.len(), 20);
    let (before, _) = run(&format!(
        "filesrc location={film} ! qtdemux ! h264parse ! avdec_h264 ! identity name=up ! fakesink"
    ))
    .unwrap();
    assert_eq!(before.sizes, [(192, 128)]);
    assert_eq!(before.times.len(), 20);
}

#[test]
fn a_change_of_size_in_a_stream_loses_no_frame() {
    let part = |width: u32| {
        format!(
            "videotestsrc num-buffers=5 \
             ! video/x-raw,format=I420,width={width},height=120,framerate=25/1 ! c."
        )
    };
    let (before, after) = run(&format!(
        "concat name=c ! tadsrupscale name=up scale=2 ! fakesink {} {}",
        part(160),
        part(96)
    ))
    .unwrap();
    assert_eq!(before.sizes, [(160, 120), (96, 120)]);
    assert_eq!(after.sizes, [(320, 240), (192, 240)]);
    assert_eq!(after.times.len(), 10);
    assert_eq!(after.times, before.times);
}

#[test]
fn interlaced_video_is_refused_or_passed_through() {
    let interlaced = |properties: &str| {
        run(&format!(
            "videotestsrc num-buffers=10 \
             ! video/x-raw,format=I420,width=160,height=120,framerate=50/1 \
             ! interlace field-pattern=2:2 ! tadsrupscale name=up {properties} ! fakesink"
        ))
    };
    let error = interlaced("").unwrap_err();
    assert!(error.contains("deinterlace"), "{error}");
    let (before, after) = interlaced("fallback=passthrough").unwrap();
    assert_eq!(after.sizes, [(160, 120)]);
    assert_eq!(after.times, before.times);
}

#[test]
fn deinterlaced_video_is_upscaled() {
    let (_, after) = run(
        "videotestsrc num-buffers=10 ! video/x-raw,format=I420,width=160,height=120,framerate=50/1 \
         ! interlace field-pattern=2:2 ! deinterlace ! tadsrupscale name=up scale=2 ! fakesink",
    )
    .unwrap();
    assert_eq!(after.sizes, [(320, 240)]);
}

#[test]
fn a_missing_model_stops_the_pipeline_and_is_named() {
    let error =
        run("videotestsrc num-buffers=3 ! tadsrupscale name=up model=/no/such/model ! fakesink");
    assert!(error.unwrap_err().contains("/no/such/model"));
}

/// Runs in a child process of the next test, with the tracer active from the start.
#[test]
#[ignore = "needs GST_TRACERS=leaks"]
fn leaks_in_this_process() {
    run("videotestsrc num-buffers=3 ! tadsrupscale name=up scale=2 \
         ! video/x-raw,format=I420 ! x264enc ! fakesink")
    .unwrap();
    run("videotestsrc num-buffers=3 ! tadsrupscale name=up model=/no/such/model ! fakesink")
        .unwrap_err();
    let tracer = gst::active_tracers()
        .into_iter()
        .next()
        .expect("leaks tracer");
    tracer.emit_by_name::<()>("log-live-objects", &[]);
}

#[test]
fn no_object_is_leaked_by_a_pipeline() {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "pipelines::leaks_in_this_process", "--ignored"])
        .env("GST_TRACERS", "leaks")
        .env("GST_DEBUG", "GST_TRACER:7")
        .env("GST_DEBUG_NO_COLOR", "1")
        .env_remove("GST_DEBUG_FILE")
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{log}");
    // Without leaks, the log still contains the declaration of the record.
    assert!(log.contains("object-alive"), "{log}");
    for line in log.lines().filter(|line| line.contains("object-alive")) {
        for kind in [
            "GstTadsr",
            "GstBuffer,",
            "GstPipeline",
            "GstVideoBufferPool",
            "GstPad,",
        ] {
            assert!(!line.contains(kind), "leaked: {line}");
        }
    }
}
