// SPDX-License-Identifier: MPL-2.0

//! Tests of the element, by theme.

#[path = "../common/mod.rs"]
mod common;

mod auto;
mod buffers;
mod colours;
mod cuda;
mod models;
mod negotiation;
mod overload;
mod pinned;
mod pipelines;
mod pixels;
mod resshift;
mod settings;
mod stress;
