// SPDX-License-Identifier: MPL-2.0

//! A control binding that sets a property to the stream time in seconds.

use gst::{ffi, glib, glib::translate::*, prelude::*, subclass::prelude::*};

glib::wrapper! {
    pub struct SecondsBinding(ObjectSubclass<imp::SecondsBinding>)
        @extends gst::ControlBinding, gst::Object;
}

impl SecondsBinding {
    pub fn new(object: &impl IsA<gst::Object>, property: &str) -> Self {
        glib::Object::builder()
            .property("object", object)
            .property("name", property)
            .build()
    }
}

mod imp {
    use super::*;

    #[derive(Default)]
    pub struct SecondsBinding;

    #[glib::object_subclass]
    impl ObjectSubclass for SecondsBinding {
        const NAME: &'static str = "GstTadsrTestSecondsBinding";
        type Type = super::SecondsBinding;
        type ParentType = gst::ControlBinding;
    }

    impl ObjectImpl for SecondsBinding {}
    impl GstObjectImpl for SecondsBinding {}
}

// SAFETY: the class has the layout of its parent; only a virtual method of the right type is
// replaced.
unsafe impl IsSubclassable<imp::SecondsBinding> for gst::ControlBinding {
    fn class_init(class: &mut glib::Class<Self>) {
        Self::parent_class_init::<imp::SecondsBinding>(class);
        class.as_mut().sync_values = Some(sync_values);
    }
}

unsafe extern "C" fn sync_values(
    binding: *mut ffi::GstControlBinding,
    object: *mut ffi::GstObject,
    time: ffi::GstClockTime,
    _last: ffi::GstClockTime,
) -> glib::ffi::gboolean {
    // SAFETY: GStreamer passes a binding and the object it belongs to, both alive during the call.
    let (binding, object) = unsafe {
        (
            gst::ControlBinding::from_glib_borrow(binding),
            gst::Object::from_glib_borrow(object),
        )
    };
    object.set_property(binding.property_name(), time as f64 / 1e9);
    glib::ffi::GTRUE
}
