//! Degradation by video codecs: a clip is encoded and decoded by H.264, H.265, VP9 or AV1, in
//! memory, by GStreamer.
//!
//! Clips rather than images, because P and B frames inherit artefacts from their neighbours.

use rand::Rng;
use serde::{Deserialize, Serialize};

#[cfg(feature = "video")]
use crate::video::{StreamInfo, through};
use crate::{
    Error, Result,
    frame::{Frame, FrameInfo, Matrix, PixelFormat},
    train::patch::Patch,
};

/// A video codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    H264,
    H265,
    Vp9,
    Av1,
}

/// All about a codec: one row of [`TABLE`].
struct Row {
    kind: Kind,
    /// Name in options.
    key: &'static str,
    /// Name for people.
    name: &'static str,
    /// GStreamer elements, and their packages in Debian and Ubuntu.
    needs: &'static str,
    /// Returns encoder and decoder as a launch line.
    #[cfg(feature = "video")]
    elements: fn(&Codec, &Stream) -> String,
}

/// The codecs, in the order of [`Kind::ALL`].
const TABLE: [Row; 4] = [
    Row {
        kind: Kind::H264,
        key: "h264",
        name: "H.264",
        needs: "x264enc (gstreamer1.0-plugins-ugly) and avdec_h264 (gstreamer1.0-libav)",
        #[cfg(feature = "video")]
        elements: h264,
    },
    Row {
        kind: Kind::H265,
        key: "h265",
        name: "H.265",
        needs: "x265enc, h265parse (gstreamer1.0-plugins-bad) and avdec_h265 \
                (gstreamer1.0-libav)",
        #[cfg(feature = "video")]
        elements: h265,
    },
    Row {
        kind: Kind::Vp9,
        key: "vp9",
        name: "VP9",
        needs: "vp9enc and vp9dec (gstreamer1.0-plugins-good)",
        #[cfg(feature = "video")]
        elements: vp9,
    },
    Row {
        kind: Kind::Av1,
        key: "av1",
        name: "AV1",
        needs: "av1enc, av1parse and av1dec (gstreamer1.0-plugins-bad)",
        #[cfg(feature = "video")]
        elements: av1,
    },
];

/// Frames per second of training clips, by which encoders plan their bit rate.
const FRAMERATE: u32 = 25;

impl Kind {
    pub const ALL: [Self; 4] = [TABLE[0].kind, TABLE[1].kind, TABLE[2].kind, TABLE[3].kind];

    fn row(self) -> &'static Row {
        // The order of the table is that of the variants.
        &TABLE[self as usize]
    }

    /// Returns the codec of this key, such as `h264`.
    pub fn of_key(key: &str) -> Option<Self> {
        let row = TABLE.iter().find(|row| row.key == key);
        row.map(|row| row.kind)
    }

    /// Returns the name in options, such as `h264`.
    pub fn key(self) -> &'static str {
        self.row().key
    }

    /// Returns the name for people.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Returns the GStreamer elements that the codec needs, and their packages in Debian and
    /// Ubuntu.
    pub fn needs(self) -> &'static str {
        self.row().needs
    }

    /// Sends two frames through the codec, to test that GStreamer has it on this machine.
    ///
    /// # Errors
    /// As [`Codec::round_trip`].
    pub fn try_out(self) -> Result<()> {
        let codec = Codec {
            kind: self,
            rate: Rate::Crf(30),
            effort: 0,
            gop: 10,
            b_frames: 0,
            mb_tree: false,
        };
        let frame = Frame::new(FrameInfo::new(PixelFormat::I420, 64, 64))?;
        codec.round_trip(&[frame.clone(), frame], 25).map(drop)
    }
}

/// A codec and its settings.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Codec {
    pub kind: Kind,
    pub rate: Rate,
    /// Effort of the encoder, 0 (fastest) to 5 (slowest).
    pub effort: u8,
    /// Maximum number of frames from one key frame to the next.
    pub gop: u32,
    /// Consecutive B frames. For VP9 and AV1 any value but 0 allows frames that are never shown
    /// (alternative references).
    pub b_frames: u8,
    /// Macroblock trees of x264. They are the default of x264, but read uninitialised memory: equal
    /// frames may result in different streams.
    pub mb_tree: bool,
}

/// Rate control.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    /// Constant quality: the CRF of H.264 and H.265, 0 (best) to 51. For VP9 and AV1 it maps to a
    /// constant quantizer of 0 to 63.
    Crf(u8),
    /// Mean bits per pixel.
    BitsPerPixel(f32),
}

/// Codecs that degrade clips, and the ranges of their settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Codecs {
    /// Weight of each codec; the weights need not sum to 1.
    pub h264: f64,
    pub h265: f64,
    pub vp9: f64,
    pub av1: f64,
    /// Range of the CRF.
    pub crf: (u8, u8),
    /// Probability of a bit rate instead of a constant quality.
    pub rate_controlled: f64,
    /// Range of the bits per pixel; the logarithm is uniform.
    pub bits_per_pixel: (f32, f32),
    /// Range of the effort.
    pub effort: (u8, u8),
    /// Range of the frames from one key frame to the next.
    pub gop: (u32, u32),
    /// Range of consecutive B frames.
    pub b_frames: (u8, u8),
}

/// Mixture of streams: mostly H.264, from good to poor quality.
impl Default for Codecs {
    fn default() -> Self {
        Self {
            h264: 0.5,
            h265: 0.2,
            vp9: 0.2,
            av1: 0.1,
            crf: (18, 38),
            rate_controlled: 0.25,
            bits_per_pixel: (0.03, 0.3),
            effort: (1, 4),
            gop: (12, 250),
            b_frames: (0, 3),
        }
    }
}

impl Codecs {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Setting`] that names the first value that is out of range.
    pub fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Setting(format!("codecs: {text}")));
        let weights = Kind::ALL.map(|kind| self.weight(kind));
        let sum: f64 = weights.iter().sum();
        if weights.iter().any(|w| *w < 0.0) || !(sum > 0.0 && sum.is_finite()) {
            return wrong("frequencies are not negative and not all zero".into());
        }
        if !(0.0..=1.0).contains(&self.rate_controlled) {
            return wrong(format!(
                "rate_controlled = {}: a probability is 0 to 1",
                self.rate_controlled
            ));
        }
        let (low, high) = self.bits_per_pixel;
        if !(0.0 < low && low <= high && high <= 24.0) {
            return wrong(format!(
                "bits_per_pixel = {low}..{high}: need 0 < low <= high <= 24"
            ));
        }
        let ranges = [
            ("crf", self.crf.0.into(), self.crf.1.into(), 0, 51),
            ("effort", self.effort.0.into(), self.effort.1.into(), 0, 5),
            ("gop", self.gop.0, self.gop.1, 1, 10_000),
            (
                "b_frames",
                self.b_frames.0.into(),
                self.b_frames.1.into(),
                0,
                16,
            ),
        ];
        for (name, low, high, min, max) in ranges {
            if !(min <= low && low <= high && high <= max) {
                return wrong(format!(
                    "{name} = {low}..{high}: need {min} <= low <= high <= {max}"
                ));
            }
        }
        Ok(())
    }

    /// Returns the weight of `kind`.
    pub fn weight(&self, kind: Kind) -> f64 {
        *self.clone().weight_mut(kind)
    }

    fn weight_mut(&mut self, kind: Kind) -> &mut f64 {
        match kind {
            Kind::H264 => &mut self.h264,
            Kind::H265 => &mut self.h265,
            Kind::Vp9 => &mut self.vp9,
            Kind::Av1 => &mut self.av1,
        }
    }

    /// Returns the codecs without `kind`.
    pub fn without(mut self, kind: Kind) -> Self {
        *self.weight_mut(kind) = 0.0;
        self
    }

    /// Returns a random codec within the ranges, which must have been checked.
    pub fn sample<R: Rng + ?Sized>(&self, rng: &mut R) -> Codec {
        let kinds = Kind::ALL.map(|kind| (kind, self.weight(kind)));
        let mut left = rng.random::<f64>() * kinds.iter().map(|k| k.1).sum::<f64>();
        let mut kind = Kind::H264;
        for (candidate, weight) in kinds {
            if weight > 0.0 && left >= 0.0 {
                kind = candidate;
            }
            left -= weight;
        }
        let rate = if rng.random_bool(self.rate_controlled) {
            let (low, high) = self.bits_per_pixel;
            Rate::BitsPerPixel(rng.random_range(low.ln()..=high.ln()).exp())
        } else {
            Rate::Crf(rng.random_range(self.crf.0..=self.crf.1))
        };
        Codec {
            kind,
            rate,
            effort: rng.random_range(self.effort.0..=self.effort.1),
            gop: rng.random_range(self.gop.0..=self.gop.1),
            b_frames: rng.random_range(self.b_frames.0..=self.b_frames.1),
            mb_tree: false,
        }
    }
}

impl Codec {
    /// Encodes `frames` as a clip of `framerate` frames per second and decodes them again. The
    /// frames are of one kind, I420 or I420_10LE, with even sides of at least 32 pixels. The result
    /// depends on the frames and the codec only, see [`Self::mb_tree`] for the exception.
    ///
    /// # Errors
    /// [`Error::Frame`] for other frames, [`Error::Setting`] when GStreamer lacks the codec or it
    /// fails.
    pub fn round_trip(&self, frames: &[Frame], framerate: u32) -> Result<Vec<Frame>> {
        let Some(first) = frames.first() else {
            return Ok(Vec::new());
        };
        let info = first.info();
        let planar = matches!(info.format, PixelFormat::I420 | PixelFormat::I420_10Le);
        let side = |len: usize| len >= 32 && len.is_multiple_of(2);
        if !planar || !side(info.width) || !side(info.height) {
            return Err(Error::Frame(format!(
                "{} {}x{}: codecs take I420 and I420_10LE with even sides from 32 pixels on",
                info.format.name(),
                info.width,
                info.height
            )));
        }
        self.send(*info, frames, framerate)
    }

    /// Encodes and decodes the frames of `clip`, which have even sides of at least 32 pixels.
    ///
    /// # Errors
    /// As [`Self::round_trip`].
    pub fn compress(&self, clip: &[Patch]) -> Result<Vec<Patch>> {
        let frame = |picture: &Patch| {
            let mut info = FrameInfo::new(PixelFormat::I420, picture.width, picture.height);
            // The matrix of the luma that models are trained on, for all sizes.
            info.colorimetry.matrix = Matrix::Bt709;
            Frame::from_rgb8_as(info, &picture.to_rgb8())
        };
        let frames = clip.iter().map(frame).collect::<Result<Vec<_>>>()?;
        let made = self.round_trip(&frames, FRAMERATE)?;
        let picture = |frame: &Frame| {
            let info = frame.info();
            let rgb = frame.to_rgb8()?;
            Ok(Patch::from_rgb8(info.width, info.height, &rgb))
        };
        made.iter().map(picture).collect()
    }

    #[cfg(feature = "video")]
    fn send(&self, info: FrameInfo, frames: &[Frame], framerate: u32) -> Result<Vec<Frame>> {
        let stream = StreamInfo::new(info, Some((framerate, 1)))?;
        let elements = (self.kind.row().elements)(self, &Stream::new(&info, framerate));
        through(&stream, frames, &elements)
    }

    #[cfg(not(feature = "video"))]
    fn send(&self, _: FrameInfo, _: &[Frame], _: u32) -> Result<Vec<Frame>> {
        let name = self.kind.name();
        let text = format!("{name}: this program is built without GStreamer (feature 'video')");
        Err(Error::Setting(text))
    }
}

/// Size and rate of a clip, for rate control.
#[cfg(feature = "video")]
struct Stream {
    /// Pixels per second.
    pixels: f64,
}

#[cfg(feature = "video")]
impl Stream {
    fn new(info: &FrameInfo, framerate: u32) -> Self {
        Self {
            pixels: (info.width * info.height) as f64 * f64::from(framerate),
        }
    }

    /// Bits per second.
    fn bits(&self, bits_per_pixel: f32) -> f64 {
        (f64::from(bits_per_pixel) * self.pixels).max(1000.0)
    }

    /// Kilobits per second, rounded up.
    fn kbits(&self, bits_per_pixel: f32) -> f64 {
        (self.bits(bits_per_pixel) / 1000.0).ceil()
    }
}

#[cfg(feature = "video")]
impl Codec {
    /// Encoder preset of x264 and x265.
    fn preset(&self) -> &'static str {
        PRESETS[usize::from(self.effort.min(5))]
    }

    /// `cpu-used` of VP9.
    fn speed(&self) -> u32 {
        SPEEDS[usize::from(self.effort.min(5))]
    }
}

/// Maps a CRF of 0 to 51 to a quantizer of 0 to 63.
#[cfg(feature = "video")]
fn quantizer(crf: u8) -> u32 {
    (u32::from(crf) * 63).div_ceil(51).min(63)
}

// Encoders and decoders have one thread each, because many clips are made at the same time.

#[cfg(feature = "video")]
fn h264(codec: &Codec, stream: &Stream) -> String {
    let rate = match codec.rate {
        Rate::Crf(crf) => format!("pass=qual quantizer={crf}"),
        Rate::BitsPerPixel(bpp) => format!("pass=cbr bitrate={}", stream.kbits(bpp)),
    };
    let Codec {
        gop,
        b_frames,
        mb_tree,
        ..
    } = codec;
    let preset = codec.preset();
    format!(
        "x264enc {rate} speed-preset={preset} key-int-max={gop} bframes={b_frames} b-adapt=false \
         mb-tree={mb_tree} threads=1 ! avdec_h264 max-threads=1"
    )
}

#[cfg(feature = "video")]
fn h265(codec: &Codec, stream: &Stream) -> String {
    let rate = match codec.rate {
        Rate::Crf(crf) => format!("crf={crf}"),
        Rate::BitsPerPixel(bpp) => format!("bitrate={}", stream.kbits(bpp)),
    };
    let Codec { gop, b_frames, .. } = codec;
    let preset = codec.preset();
    format!(
        "x265enc speed-preset={preset} key-int-max={gop} \
         option-string=\"{rate}:bframes={b_frames}:b-adapt=0:pools=none:frame-threads=1:wpp=0:\
         log-level=none\" ! h265parse ! avdec_h265 max-threads=1"
    )
}

#[cfg(feature = "video")]
fn vp9(codec: &Codec, stream: &Stream) -> String {
    let rate = match codec.rate {
        Rate::Crf(crf) => {
            let q = quantizer(crf);
            format!("min-quantizer={q} max-quantizer={q} target-bitrate=100000000")
        }
        Rate::BitsPerPixel(bpp) => format!("target-bitrate={}", stream.bits(bpp).ceil()),
    };
    let hidden = match codec.b_frames {
        0 => "lag-in-frames=0",
        _ => "lag-in-frames=16 auto-alt-ref=true",
    };
    let (gop, speed) = (codec.gop, codec.speed());
    format!(
        "vp9enc {rate} deadline=1000000 cpu-used={speed} keyframe-max-dist={gop} {hidden} \
         threads=1 ! vp9dec threads=1"
    )
}

#[cfg(feature = "video")]
fn av1(codec: &Codec, stream: &Stream) -> String {
    let rate = match codec.rate {
        Rate::Crf(crf) => {
            let q = quantizer(crf);
            format!("min-quantizer={q} max-quantizer={q} target-bitrate=100000")
        }
        Rate::BitsPerPixel(bpp) => {
            // On short clips only CBR without look-ahead follows the rate.
            let rate = stream.kbits(bpp);
            format!("end-usage=cbr max-quantizer=63 target-bitrate={rate}")
        }
    };
    let ahead = codec.b_frames > 0 && matches!(codec.rate, Rate::Crf(_));
    let hidden = if ahead { 16 } else { 0 };
    let (gop, speed) = (codec.gop, codec.speed() + 2);
    format!(
        "av1enc {rate} cpu-used={speed} keyframe-max-dist={gop} lag-in-frames={hidden} threads=1 \
         row-mt=false ! av1parse ! av1dec"
    )
}

/// Presets of x264 and x265 by effort.
#[cfg(feature = "video")]
const PRESETS: [&str; 6] = [
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
];
/// Values of `cpu-used` of VP9 by effort.
#[cfg(feature = "video")]
const SPEEDS: [u32; 6] = [8, 7, 6, 5, 4, 3];

#[cfg(all(test, feature = "video"))]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    /// Texture that moves by a pixel per frame.
    fn clip(len: usize, format: PixelFormat) -> Vec<Frame> {
        let info = FrameInfo::new(format, 64, 48);
        let frame = |t: usize| {
            let rgb: Vec<u8> = (0..64 * 48)
                .flat_map(|i| {
                    let (x, y) = (i % 64 + t, i / 64);
                    let noise = (x * 7919 + y * 104_729 + x * y * 31) % 97;
                    [noise + 60, (x * 3 + y) % 160 + 40, (y * 4) % 200].map(|v| v as u8)
                })
                .collect();
            Frame::from_rgb8_as(info, &rgb).unwrap()
        };
        (0..len).map(frame).collect()
    }

    fn codec(kind: Kind, crf: u8) -> Codec {
        Codec {
            kind,
            rate: Rate::Crf(crf),
            effort: 1,
            gop: 250,
            b_frames: 2,
            mb_tree: false,
        }
    }

    /// Returns `true` if GStreamer has the codec on this machine.
    fn is_there(kind: Kind) -> bool {
        let there = kind.try_out();
        if let Err(e) = &there {
            eprintln!("skipped: {e}");
        }
        there.is_ok()
    }

    /// Returns the mean squared error of luma.
    fn error(made: &[Frame], of: &[Frame]) -> f64 {
        assert_eq!(made.len(), of.len());
        let pairs = made
            .iter()
            .zip(of)
            .flat_map(|(a, b)| a.plane(0).iter().zip(b.plane(0)));
        let (mut sum, mut n) = (0.0, 0.0);
        for (a, b) in pairs {
            sum += (f64::from(*a) - f64::from(*b)).powi(2);
            n += 1.0;
        }
        sum / n
    }

    #[test]
    fn every_codec_degrades_more_at_lower_quality() {
        let frames = clip(7, PixelFormat::I420);
        for kind in Kind::ALL.into_iter().filter(|k| is_there(*k)) {
            let degradation = [5, 25, 45]
                .map(|crf| error(&codec(kind, crf).round_trip(&frames, 25).unwrap(), &frames));
            assert!(
                degradation[0] < degradation[1] && degradation[1] < degradation[2],
                "{kind:?}: {degradation:?}"
            );
            assert!(
                degradation[0] < 10.0 && degradation[2] > 50.0,
                "{kind:?}: {degradation:?}"
            );
            let bits = [0.05, 3.0].map(|bpp| {
                let rate = Rate::BitsPerPixel(bpp);
                let codec = Codec {
                    rate,
                    ..codec(kind, 0)
                };
                error(&codec.round_trip(&frames, 25).unwrap(), &frames)
            });
            assert!(bits[1] < bits[0], "{kind:?}: {bits:?}");
        }
    }

    #[test]
    fn frames_inherit_artefacts_and_the_same_clip_has_the_same_result() {
        let frames = clip(7, PixelFormat::I420);
        for kind in Kind::ALL.into_iter().filter(|k| is_there(*k)) {
            let bytes = |codec: Codec| -> Vec<Vec<u8>> {
                let made = codec.round_trip(&frames, 25).unwrap();
                made.iter().map(|f| f.plane(0).to_vec()).collect()
            };
            let plain = codec(kind, 30);
            assert_eq!(bytes(plain), bytes(plain), "{kind:?}");
            let intra = Codec {
                gop: 1,
                b_frames: 0,
                ..plain
            };
            let (intra, inter) = (bytes(intra), bytes(plain));
            assert!(intra[3..] != inter[3..], "{kind:?}");
        }
    }

    #[test]
    fn ten_bits_stay_ten_bits_if_the_codec_has_them() {
        let frames = clip(3, PixelFormat::I420_10Le);
        let made = codec(Kind::H264, 10).round_trip(&frames, 25).unwrap();
        assert_eq!(made[2].info(), frames[2].info());
        assert!(made[2].plane(0).chunks(2).any(|s| s[0] & 3 != 0));
    }

    #[test]
    fn frames_that_codecs_do_not_take_are_refused() {
        for (format, w, h) in [
            (PixelFormat::Rgb, 64, 64),
            (PixelFormat::I420, 33, 64),
            (PixelFormat::I420, 64, 16),
        ] {
            let frame = Frame::new(FrameInfo::new(format, w, h)).unwrap();
            let made = codec(Kind::H264, 20).round_trip(&[frame], 25);
            assert!(matches!(made, Err(Error::Frame(_))), "{format:?} {w}x{h}");
        }
        assert!(
            codec(Kind::H264, 20)
                .round_trip(&[], 25)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn codecs_are_sampled_from_their_ranges_which_are_checked() {
        let mut codecs = Codecs {
            h264: 0.0,
            av1: 0.0,
            gop: (5, 9),
            ..Codecs::default()
        };
        codecs.check().unwrap();
        let mut rng = SmallRng::seed_from_u64(1);
        let sampled: Vec<_> = (0..200).map(|_| codecs.sample(&mut rng)).collect();
        let count = |kind| sampled.iter().filter(|c| c.kind == kind).count();
        assert!(count(Kind::H265) > 60 && count(Kind::Vp9) > 60);
        assert_eq!(count(Kind::H265) + count(Kind::Vp9), 200);
        assert!(
            sampled
                .iter()
                .all(|c| (5..=9).contains(&c.gop) && c.b_frames <= 3)
        );
        let crf = |c: &&Codec| matches!(c.rate, Rate::Crf(18..=38));
        let rate =
            |c: &&Codec| matches!(c.rate, Rate::BitsPerPixel(b) if (0.029..0.31).contains(&b));
        let (crf, rate) = (
            sampled.iter().filter(crf).count(),
            sampled.iter().filter(rate).count(),
        );
        assert!(crf + rate == 200 && crf > 100 && rate > 20);
        codecs.crf = (30, 20);
        assert!(
            codecs
                .check()
                .unwrap_err()
                .to_string()
                .contains("crf = 30..20")
        );
    }
}
