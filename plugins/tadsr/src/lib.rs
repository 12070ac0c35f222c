// SPDX-License-Identifier: MPL-2.0

//! GStreamer plugin `tadsr`: the element [`tadsrupscale`](upscale), which upscales video with small
//! super-resolution networks.
//!
//! Negotiation, metadata and scheduling live here; networks and pixel work live in the `tadsr`
//! library.

use gst::glib;

pub mod upscale;

fn plugin_init(plugin: &gst::Plugin) -> Result<(), glib::BoolError> {
    upscale::register(plugin)
}

gst::plugin_define!(
    tadsr,
    env!("CARGO_PKG_DESCRIPTION"),
    plugin_init,
    concat!(env!("CARGO_PKG_VERSION"), "-", env!("COMMIT_ID")),
    "MPL-2.0",
    env!("CARGO_PKG_NAME"),
    env!("CARGO_PKG_NAME"),
    env!("CARGO_PKG_REPOSITORY"),
    env!("BUILD_REL_DATE")
);
