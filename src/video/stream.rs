//! Conversion between GStreamer's caps and buffers and the library's frames.

use std::time::Duration;

use gst_video::{
    VideoChromaSite, VideoColorMatrix, VideoColorRange, VideoColorimetry, VideoFrameRef, VideoInfo,
    VideoInterlaceMode, prelude::*,
};

use super::TimedFrame;
use crate::{
    Error, Result,
    frame::{
        ChromaSite, Colorimetry, Frame, FrameInfo, Matrix, PixelFormat, Range,
        aspect::{pixel_stretch, reduced},
    },
};

/// Properties of a video stream besides its samples: the kind, shape and rate of its frames.
/// Further colour properties of the file (primaries, transfer function, mastering display) are
/// passed on unchanged.
#[derive(Clone, Debug)]
pub struct StreamInfo {
    /// Fixed raw video caps with explicit colorimetry and chroma site.
    caps: gst::Caps,
    video: VideoInfo,
    frame: FrameInfo,
    duration: Option<Duration>,
}

impl StreamInfo {
    /// Returns the stream of frames like `frame` with square pixels. `framerate` is frames per
    /// second as a fraction; `None` is a variable rate.
    ///
    /// # Errors
    /// [`Error::Frame`] if a side or the rate is out of GStreamer's range.
    pub fn new(frame: FrameInfo, framerate: Option<(u32, u32)>) -> Result<Self> {
        super::init()?;
        let (num, den) = framerate.unwrap_or((0, 1));
        let wrong =
            |what: &str| Error::Frame(format!("{what} is out of the range of video streams"));
        let int = |v: usize| i32::try_from(v).map_err(|_| wrong("a side"));
        let rate = match (i32::try_from(num), i32::try_from(den)) {
            (Ok(num), Ok(den)) if den > 0 => gst::Fraction::new(num, den),
            _ => return Err(wrong(&format!("{num}/{den} frames a second"))),
        };
        let caps = gst::Caps::builder("video/x-raw")
            .field("format", frame.format.name())
            .field("width", int(frame.width)?)
            .field("height", int(frame.height)?)
            .field("framerate", rate)
            .field("pixel-aspect-ratio", gst::Fraction::new(1, 1))
            .field("interlace-mode", "progressive")
            .field(
                "colorimetry",
                colorimetry_name(&frame.colorimetry, frame.format),
            )
            .field("chroma-site", frame.chroma_site.name())
            .build();
        Self::from_caps(&caps, None).map_err(Error::Frame)
    }

    /// Returns the stream with raw video caps `caps`. Colour properties that they lack are taken
    /// from the colorimetry `container`, then from GStreamer's defaults.
    ///
    /// # Errors
    /// Names the property that the library does not support.
    pub(super) fn from_caps(caps: &gst::Caps, container: Option<&str>) -> Result<Self, String> {
        let text = |field| {
            let structure = caps.structure(0)?;
            structure.get::<String>(field).ok()
        };
        let parse = |text: &str| text.parse::<VideoColorimetry>().ok();
        let stated = text("colorimetry").as_deref().and_then(parse);
        // GStreamer replaces a colorimetry without a matrix as a whole, its range included.
        let mut caps = caps.clone();
        if let Some(structure) = caps.make_mut().structure_mut(0) {
            structure.remove_field("colorimetry");
            // Matroska's muxer would give the pixels another shape for frames of two views.
            structure.remove_fields(["multiview-mode", "multiview-flags"]);
        }
        let usual = VideoInfo::from_caps(&caps)
            .map_err(|_| format!("'{caps}' is not raw video in memory"))?;
        if usual.interlace_mode() != VideoInterlaceMode::Progressive {
            return Err(format!(
                "the video is interlaced ({}): deinterlace it first",
                usual.interlace_mode().to_str()
            ));
        }
        let colours = colours(&[stated, container.and_then(parse)], &usual);
        caps.make_mut().set("colorimetry", colours.to_string());
        let video = VideoInfo::from_caps(&caps)
            .map_err(|_| format!("'{caps}' is not raw video in memory"))?;
        let frame = frame_info(&video, &colours, &caps)
            .ok_or_else(|| format!("{} frames are not supported", video.format()))?;
        let site = text("chroma-site").and_then(|text| text.parse::<VideoChromaSite>().ok());
        let site = site.filter(|site| !site.is_empty());
        if site.is_none() && frame.format.component(crate::frame::Component::U).is_some() {
            caps.make_mut().set("chroma-site", frame.chroma_site.name());
        }
        Ok(Self {
            caps,
            video,
            frame,
            duration: None,
        })
    }

    /// Returns the kind of the frames.
    pub fn frame(&self) -> &FrameInfo {
        &self.frame
    }

    /// Returns the width of a pixel over its height.
    pub fn pixel_aspect(&self) -> (i32, i32) {
        let par = self.video.par();
        (par.numer(), par.denom())
    }

    /// Returns the frames per second; `None` if the rate is variable or unknown.
    pub fn framerate(&self) -> Option<(i32, i32)> {
        let fps = self.video.fps();
        (fps.numer() > 0).then(|| (fps.numer(), fps.denom()))
    }

    /// Returns the duration that the file states, that of its longest stream.
    pub fn duration(&self) -> Option<Duration> {
        self.duration
    }

    /// Returns the number of frames that follows from rate and duration.
    pub fn expected_frames(&self) -> Option<u64> {
        let (num, den) = self.framerate()?;
        let frames = self.duration?.as_secs_f64() * f64::from(num) / f64::from(den);
        Some(frames.round() as u64)
    }

    /// Returns the same stream with frames of another size. Pixels get another shape if the sizes
    /// have different ones: see [`pixel_stretch`].
    ///
    /// # Errors
    /// [`Error::Frame`] if a side is out of range.
    pub fn with_size(&self, width: usize, height: usize) -> Result<Self> {
        let side = |v: usize| {
            i32::try_from(v).map_err(|_| Error::Frame(format!("a video {width}x{height}")))
        };
        let mut caps = self.caps.clone();
        let caps_mut = caps.make_mut();
        caps_mut.set("width", side(width)?);
        caps_mut.set("height", side(height)?);
        if let Some((num, den)) =
            pixel_stretch((self.frame.width, self.frame.height), (width, height))
        {
            let (old_num, old_den) = self.pixel_aspect();
            let part = |v: i32| u64::try_from(v).unwrap_or(1).max(1);
            let (num, den) = reduced(num * part(old_num), den * part(old_den));
            let shape = gst::Fraction::new(num as i32, den as i32);
            caps_mut.set("pixel-aspect-ratio", shape);
        }
        let mut result = Self::from_caps(&caps, None).map_err(Error::Frame)?;
        result.duration = self.duration;
        // Only the size changes, as in the caps. The matrix stays, although that of RGB input
        // otherwise depends on the height.
        result.frame = self.frame.with_size(width, height);
        Ok(result)
    }

    pub(super) fn set_duration(&mut self, duration: Option<Duration>) {
        self.duration = duration;
    }

    /// Returns matrix, range, transfer function and primaries as GStreamer's text.
    pub(super) fn colours(&self) -> String {
        self.video.colorimetry().to_string()
    }

    /// Returns the colorimetry of the frames as luma and chroma; `None` for RGB.
    pub(super) fn coded_colours(&self) -> Option<String> {
        let colours = self.caps.structure(0)?.get::<String>("colorimetry").ok();
        colours.filter(|_| !self.frame.format.is_rgb())
    }

    pub(super) fn caps(&self) -> &gst::Caps {
        &self.caps
    }

    /// Returns the display time of a frame at the stream's rate.
    pub(super) fn frame_duration(&self) -> Option<Duration> {
        let (num, den) = self.framerate()?;
        Some(Duration::from_secs_f64(f64::from(den) / f64::from(num)))
    }

    /// Copies a frame from `buffer`.
    ///
    /// # Errors
    /// States why the buffer does not contain a frame of the stream.
    pub(super) fn read(&self, buffer: &gst::BufferRef) -> Result<Frame, String> {
        let short = || "a decoded frame is not what its caps promise".to_string();
        let mapped =
            VideoFrameRef::from_buffer_ref_readable(buffer, &self.video).map_err(|_| short())?;
        let mut frame = Frame::new(self.frame).map_err(|e| e.to_string())?;
        for plane in 0..self.frame.format.planes() {
            let (row, _) = self
                .frame
                .format
                .plane_size(plane, self.frame.width, self.frame.height);
            let stride = mapped.plane_stride().get(plane).copied();
            let stride = stride.and_then(|s| usize::try_from(s).ok());
            let stride = stride.filter(|s| *s >= row).ok_or_else(short)?;
            let data = mapped.plane_data(plane as u32).map_err(|_| short())?;
            let target = frame.plane_mut(plane).chunks_exact_mut(row);
            if data.len() < (target.len() - 1) * stride + row {
                return Err(short());
            }
            for (to, from) in target.zip(data.chunks(stride)) {
                to.copy_from_slice(&from[..row]);
            }
        }
        Ok(frame)
    }

    /// As [`Self::write`], with the times of the frame.
    pub(super) fn timed(&self, frame: &TimedFrame) -> Result<gst::Buffer, String> {
        let mut buffer = self.write(&frame.frame)?;
        if let Some(buffer) = buffer.get_mut() {
            let clock = |d: Duration| gst::ClockTime::try_from(d).ok();
            buffer.set_pts(clock(frame.pts));
            buffer.set_duration(frame.duration.and_then(clock));
        }
        Ok(buffer)
    }

    /// Returns a buffer with the content of `frame`.
    ///
    /// # Errors
    /// If the frame does not match the stream, or memory cannot be allocated.
    pub(super) fn write(&self, frame: &Frame) -> Result<gst::Buffer, String> {
        let (is, must) = (frame.info(), &self.frame);
        if is != must {
            return Err(format!(
                "a frame of {is} in a stream of {must}: all frames of a file must be of one kind"
            ));
        }
        let mut buffer = gst::Buffer::with_size(self.video.size())
            .map_err(|_| format!("no memory for a frame of {}x{}", is.width, is.height))?;
        let memory = buffer.get_mut().ok_or("a new buffer is shared")?;
        let mut mapped = VideoFrameRef::from_buffer_ref_writable(memory, &self.video)
            .map_err(|_| "a new buffer cannot be written".to_string())?;
        for plane in 0..is.format.planes() {
            let (row, _) = is.format.plane_size(plane, is.width, is.height);
            let stride = mapped.plane_stride().get(plane).copied();
            let stride = stride.and_then(|s| usize::try_from(s).ok()).unwrap_or(row);
            let data = mapped
                .plane_data_mut(plane as u32)
                .map_err(|e| e.to_string())?;
            let rows = frame.plane(plane).chunks_exact(row);
            for (to, from) in data.chunks_mut(stride).zip(rows) {
                to.get_mut(..row)
                    .ok_or("a plane is too short")?
                    .copy_from_slice(from);
            }
        }
        drop(mapped);
        Ok(buffer)
    }
}

/// Returns the first known value of each part among `stated`. Unknown range and matrix are those of
/// `usual`, because frames cannot be converted without. Returns `usual` if nothing is stated.
fn colours(stated: &[Option<VideoColorimetry>], usual: &VideoInfo) -> VideoColorimetry {
    use gst_video::{VideoColorPrimaries, VideoTransferFunction};
    let stated: Vec<_> = stated.iter().flatten().collect();
    let default = usual.colorimetry();
    if stated.is_empty() {
        return default;
    }
    let first = |known: &dyn Fn(&VideoColorimetry) -> bool| stated.iter().find(|c| known(c));
    let range = first(&|c| c.range() != VideoColorRange::Unknown);
    let matrix = first(&|c| c.matrix() != VideoColorMatrix::Unknown);
    let transfer = first(&|c| c.transfer() != VideoTransferFunction::Unknown);
    let primaries = first(&|c| c.primaries() != VideoColorPrimaries::Unknown);
    // A matrix of RGB makes no sense for luma and chroma, and vice versa.
    let fits = |c: &&&VideoColorimetry| (c.matrix() == VideoColorMatrix::Rgb) == usual.is_rgb();
    VideoColorimetry::new(
        range.map_or(default.range(), |c| c.range()),
        matrix.filter(fits).map_or(default.matrix(), |c| c.matrix()),
        transfer.map_or(VideoTransferFunction::Unknown, |c| c.transfer()),
        primaries.map_or(VideoColorPrimaries::Unknown, |c| c.primaries()),
    )
}

/// Returns the library's description of frames with `video` and `colorimetry`, which was read from
/// `caps`; `None` for a format that the library lacks. An unsupported matrix becomes the nearest
/// one.
fn frame_info(
    video: &VideoInfo,
    colorimetry: &VideoColorimetry,
    caps: &gst::CapsRef,
) -> Option<FrameInfo> {
    let format = PixelFormat::from_name(video.format().to_str())?;
    let mut frame = FrameInfo::new(format, video.width() as usize, video.height() as usize);
    match colorimetry.matrix() {
        VideoColorMatrix::Bt601 | VideoColorMatrix::Fcc => {
            frame.colorimetry.matrix = Matrix::Bt601;
        }
        VideoColorMatrix::Bt709 | VideoColorMatrix::Smpte240m => {
            frame.colorimetry.matrix = Matrix::Bt709;
        }
        VideoColorMatrix::Bt2020 => frame.colorimetry.matrix = Matrix::Bt2020,
        _ => {}
    }
    match colorimetry.range() {
        VideoColorRange::Range0_255 => frame.colorimetry.range = Range::Full,
        VideoColorRange::Range16_235 => frame.colorimetry.range = Range::Limited,
        _ => {}
    }
    // If the caps state a chroma site and no colorimetry, `video` has the default for both.
    let stated = caps.structure(0)?.get::<&str>("chroma-site").ok();
    let stated = stated.and_then(|text| text.parse().ok());
    let site: VideoChromaSite = stated.unwrap_or(video.chroma_site());
    if !site.is_empty() {
        frame.chroma_site = ChromaSite {
            horizontal_cosited: site.contains(VideoChromaSite::H_COSITED),
            vertical_cosited: site.contains(VideoChromaSite::V_COSITED),
        };
    }
    Some(frame)
}

/// Returns GStreamer's text for colours of which the library knows matrix and range. Transfer
/// function and primaries stay unknown, except for the combinations that have a name.
fn colorimetry_name(colorimetry: &Colorimetry, format: PixelFormat) -> String {
    use gst_video::{VideoColorPrimaries, VideoTransferFunction};
    let range = match colorimetry.range {
        Range::Limited => VideoColorRange::Range16_235,
        Range::Full => VideoColorRange::Range0_255,
    };
    let (matrix, transfer, primaries) = match colorimetry.matrix {
        Matrix::Bt601 => (
            VideoColorMatrix::Bt601,
            VideoTransferFunction::Bt601,
            VideoColorPrimaries::Smpte170m,
        ),
        Matrix::Bt709 => (
            VideoColorMatrix::Bt709,
            VideoTransferFunction::Bt709,
            VideoColorPrimaries::Bt709,
        ),
        Matrix::Bt2020 => (
            VideoColorMatrix::Bt2020,
            VideoTransferFunction::Bt202012,
            VideoColorPrimaries::Bt2020,
        ),
    };
    if format.is_rgb() {
        let (matrix, transfer) = (VideoColorMatrix::Rgb, VideoTransferFunction::Srgb);
        let primaries = VideoColorPrimaries::Bt709;
        return VideoColorimetry::new(range, matrix, transfer, primaries).to_string();
    }
    VideoColorimetry::new(range, matrix, transfer, primaries).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(fields: &str) -> Result<StreamInfo, String> {
        gst::init().unwrap();
        let caps = format!("video/x-raw,framerate=25/1,{fields}");
        StreamInfo::from_caps(&caps.parse().unwrap(), None)
    }

    #[test]
    fn a_stream_made_of_a_frames_description_has_that_description() {
        for format in PixelFormat::ALL {
            for (matrix, range) in [
                (Matrix::Bt601, Range::Limited),
                (Matrix::Bt709, Range::Full),
                (Matrix::Bt2020, Range::Limited),
            ] {
                let mut frame = FrameInfo::new(format, 33, 17);
                if !format.is_rgb() {
                    frame.colorimetry = Colorimetry { matrix, range };
                }
                if format.component(crate::frame::Component::U).is_some() {
                    frame.chroma_site = ChromaSite {
                        horizontal_cosited: range == Range::Full,
                        vertical_cosited: matrix == Matrix::Bt709,
                    };
                }
                let stream = StreamInfo::new(frame, Some((30000, 1001))).unwrap();
                assert_eq!(*stream.frame(), frame);
                assert_eq!(stream.framerate(), Some((30000, 1001)));
            }
        }
    }

    #[test]
    fn colours_are_those_stated_and_stay_when_the_size_changes() {
        let small = described("format=I420,width=720,height=576").unwrap();
        assert_eq!(small.frame().colorimetry.matrix, Matrix::Bt601);
        let large = small.with_size(1440, 1152).unwrap();
        assert_eq!(large.frame().colorimetry.matrix, Matrix::Bt601);
        assert_eq!(large.frame().chroma_site, small.frame().chroma_site);
        let hdr = "format=I420_10LE,width=64,height=64,colorimetry=bt2100-pq,chroma-site=mpeg2";
        let hdr = described(hdr).unwrap().with_size(128, 128).unwrap();
        assert_eq!(hdr.frame().colorimetry.matrix, Matrix::Bt2020);
        let text = hdr.caps().to_string();
        assert!(text.contains("bt2100-pq"), "{text}");
    }

    #[test]
    fn colours_without_a_matrix_are_what_they_are_taken_for_at_any_size() {
        let small = described("format=I420,width=64,height=300,colorimetry=2:0:5:1").unwrap();
        let large = small.with_size(128, 600).unwrap();
        assert_eq!(large.frame().colorimetry, small.frame().colorimetry);
        let taken = large.caps().to_string();
        assert!(taken.contains("2:4:5:1"), "{taken}");
    }

    #[test]
    fn a_stated_chroma_site_stays_as_it_is_stated() {
        for site in ["dv", "alt-line", "mpeg2"] {
            let fields = format!("format=I420,width=64,height=64,chroma-site={site}");
            let text = described(&fields).unwrap().caps().to_string();
            assert!(text.contains(site), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_upscaled_is_refused_with_its_name() {
        let refused = |fields| described(fields).unwrap_err();
        let interlaced = "format=I420,width=8,height=8,interlace-mode=interleaved";
        assert!(refused(interlaced).contains("interlaced (interleaved)"));
        assert!(refused("format=v210,width=8,height=8").contains("v210"));
    }

    #[test]
    fn frames_survive_the_way_through_a_buffer_in_every_format_and_odd_size() {
        for format in PixelFormat::ALL {
            for (w, h) in [(1, 1), (5, 3), (16, 9)] {
                let info = FrameInfo::new(format, w, h);
                let mut frame = Frame::new(info).unwrap();
                for plane in 0..format.planes() {
                    let bytes = frame.plane_mut(plane).iter_mut().enumerate();
                    bytes.for_each(|(i, b)| *b = (i * 7 + plane * 50) as u8);
                }
                let stream = StreamInfo::new(info, None).unwrap();
                let back = stream.read(&stream.write(&frame).unwrap()).unwrap();
                for plane in 0..format.planes() {
                    assert_eq!(back.plane(plane), frame.plane(plane), "{format:?} {w}x{h}");
                }
            }
        }
        let stream = StreamInfo::new(FrameInfo::new(PixelFormat::I420, 8, 8), None).unwrap();
        let other = Frame::new(FrameInfo::new(PixelFormat::I420, 8, 6)).unwrap();
        assert!(stream.write(&other).unwrap_err().contains("8x6"));
    }
}
