// SPDX-License-Identifier: MPL-2.0

//! Buffers in pinned memory, which an emulated CUDA device reads and writes directly.

use std::sync::Arc;

use crate::common::*;
use gst::prelude::*;
use tadsr::{
    cuda::{driver::Driver, emulator::Fake, is_pinned},
    engine::lite::cuda::emulated,
};

const SIZE: (u32, u32) = (24, 18);
/// Planes of a frame in I420.
const PLANES: usize = 3;

fn plug() -> Arc<Fake> {
    let fake = emulated::device((8, 0), 1 << 30);
    fake.plug();
    fake
}

fn rig(fake: &Fake, more: &[(&str, &str)]) -> Rig {
    let device = format!("cuda:{}", fake.info().ordinal);
    let mut properties = vec![("device", device.as_str()), ("fallback", "cpu")];
    properties.extend_from_slice(more);
    Rig::raw(&properties, "I420", SIZE.0, SIZE.1)
}

/// Returns the pool that the element proposes to upstream, in use.
fn proposed(rig: &Rig) -> gst::BufferPool {
    let pad = rig.element.static_pad("sink").unwrap();
    let mut query = gst::query::Allocation::new(pad.current_caps().as_ref(), true);
    assert!(pad.query(&mut query));
    let (pool, ..) = query.allocation_pools().next().unwrap();
    let pool = pool.unwrap();
    pool.set_active(true).unwrap();
    pool
}

/// Returns a copy of the `n`th frame in a buffer of the pool.
fn pooled(pool: &gst::BufferPool, n: u64) -> gst::Buffer {
    let mut buffer = pool.acquire_buffer(None).unwrap();
    let frame = numbered(SIZE, n);
    let bytes = frame.map_readable().unwrap();
    let to = buffer.make_mut();
    to.copy_from_slice(0, &bytes).unwrap();
    timed(buffer, n)
}

fn is_in_pinned_memory(buffer: &gst::Buffer) -> bool {
    is_pinned(&buffer.map_readable().unwrap())
}

/// Returns all output buffers so far.
fn pulled(rig: &mut Rig) -> Vec<gst::Buffer> {
    std::iter::from_fn(|| rig.harness.try_pull()).collect()
}

/// Returns the bytes of the frames `numbers`, upscaled by a device from buffers of system memory.
fn expected(count: u64) -> Vec<Vec<u8>> {
    let fake = plug();
    let mut rig = rig(&fake, &[]);
    for n in 0..count {
        rig.harness.push(numbered(SIZE, n)).unwrap();
    }
    rig.harness.push_event(gst::event::Eos::new());
    pulled(&mut rig).iter().map(bytes).collect()
}

fn bytes(buffer: &gst::Buffer) -> Vec<u8> {
    buffer.map_readable().unwrap().to_vec()
}

#[test]
fn frames_in_proposed_buffers_are_copied_once_each_way() {
    let fake = plug();
    let mut rig = rig(&fake, &[("queue-depth", "2")]);
    let pool = proposed(&rig);
    fake.log();
    for n in 0..8 {
        // Other buffers may come between, and the same one again.
        let buffer = match n {
            3 => numbered(SIZE, n),
            _ => pooled(&pool, n),
        };
        assert_eq!(is_in_pinned_memory(&buffer), n != 3);
        rig.harness.push(buffer).unwrap();
    }
    rig.harness.push_event(gst::event::Eos::new());
    let log = fake.log();
    let count = |call: &str| log.iter().filter(|c| *c == call).count();
    assert_eq!(count("upload_rows"), 7 * PLANES);
    // The device learns from the first frame that is received.
    assert_eq!((count("download"), count("download_rows")), (2, 6 * PLANES));
    let out = pulled(&mut rig);
    assert!(out.iter().all(is_in_pinned_memory));
    assert_eq!(out.iter().map(bytes).collect::<Vec<_>>(), expected(8));
}

#[test]
fn an_allocator_of_downstream_is_used() {
    let fake = plug();
    let mut rig = rig(&fake, &[]);
    let pad = rig.element.static_pad("src").unwrap();
    pad.add_probe(gst::PadProbeType::QUERY_DOWNSTREAM, |_, info| {
        if let Some(gst::QueryViewMut::Allocation(query)) = info.query_mut().map(|q| q.view_mut()) {
            let allocator = gst::Allocator::find(Some("SystemMemory")).unwrap();
            query.add_allocation_param(Some(&allocator), Default::default());
            return gst::PadProbeReturn::Handled;
        }
        gst::PadProbeReturn::Ok
    });
    let reconfigure = gst::event::Reconfigure::new();
    assert!(rig.harness.push_upstream_event(reconfigure));
    rig.harness.push(numbered(SIZE, 0)).unwrap();
    rig.harness.push_event(gst::event::Eos::new());
    let out = pulled(&mut rig);
    assert!(!is_in_pinned_memory(&out[0]));
    assert_eq!(bytes(&out[0]), expected(1)[0]);
}

#[test]
fn buffers_outlive_the_element_and_are_released_with_the_last() {
    let fake = plug();
    let mut rig = rig(&fake, &[]);
    let pool = proposed(&rig);
    let input = pooled(&pool, 0);
    for _ in 0..3 {
        rig.harness.push(input.clone()).unwrap();
    }
    let out = pulled(&mut rig);
    assert!(is_in_pinned_memory(&input) && is_in_pinned_memory(&out[0]));
    drop(rig);
    assert_eq!(bytes(&input), bytes(&numbered(SIZE, 0)));
    assert_eq!(bytes(&out[0]), expected(1)[0]);
    assert!(fake.alive() > 0);
    pool.set_active(false).unwrap();
    drop((pool, input, out));
    assert_eq!(fake.alive(), 0);
}

#[test]
fn a_device_that_is_lost_with_pinned_buffers_loses_no_frame() {
    for hangs in [false, true] {
        let fake = plug();
        let mut rig = rig(&fake, &[("queue-depth", "2")]);
        let pool = proposed(&rig);
        for n in 0..4 {
            rig.harness.push(pooled(&pool, n)).unwrap();
        }
        if hangs {
            fake.hang();
        } else {
            // `CUDA_ERROR_LAUNCH_FAILED`
            fake.fail("download_rows", 1, 719);
        }
        for n in 4..8 {
            rig.harness.push(pooled(&pool, n)).unwrap();
        }
        // More buffers than the pool has: a lost device has no memory for them.
        let held: Vec<_> = (0..20).map(|n| pooled(&pool, n)).collect();
        assert_eq!(bytes(&held[19]), bytes(&numbered(SIZE, 19)));
        rig.harness.push_event(gst::event::Eos::new());
        assert_eq!(rig.element.property::<String>("active-device"), "cpu");
        let out = pulled(&mut rig);
        assert_eq!(out.len(), 8);
        for (n, (got, want)) in out.iter().zip(expected(8)).enumerate() {
            assert_eq!(got.pts(), Some(FRAME * n as u64));
            let error = bytes(got)
                .iter()
                .zip(&want)
                .map(|(a, b)| a.abs_diff(*b))
                .max();
            // The fallback computes in another precision.
            assert!(error.unwrap() <= 5, "frame {n} is wrong by {error:?}");
        }
    }
}
