//! Real codec degradation: a clip is encoded and decoded by H.264, H.265, VP9 or AV1, in memory, by GStreamer.
//!
//! Clips, not pictures: what a P or B frame inherits from its neighbours is a part of the degradation.

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

/// Frames a second of training clips: encoders plan their bits by it.
const FRAMERATE: u32 = 25;

impl Kind {
    pub const ALL: [Self; 4] = [Self::H264, Self::H265, Self::Vp9, Self::Av1];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::H264 => "H.264",
            Self::H265 => "H.265",
            Self::Vp9 => "VP9",
            Self::Av1 => "AV1",
        }
    }

    /// What GStreamer needs for it: elements, and the packages of Debian and Ubuntu that have them.
    pub fn needs(self) -> &'static str {
        match self {
            Self::H264 => "x264enc (gstreamer1.0-plugins-ugly) and avdec_h264 (gstreamer1.0-libav)",
            Self::H265 => {
                "x265enc, h265parse (gstreamer1.0-plugins-bad) and avdec_h265 (gstreamer1.0-libav)"
            }
            Self::Vp9 => "vp9enc and vp9dec (gstreamer1.0-plugins-good)",
            Self::Av1 => "av1enc, av1parse and av1dec (gstreamer1.0-plugins-bad)",
        }
    }

    /// Sends two frames through the codec, to see whether GStreamer has it here.
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

/// A codec and how it is driven.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Codec {
    pub kind: Kind,
    pub rate: Rate,
    /// From 0, the fastest, to 5, the slowest that is worth its time on training clips.
    pub effort: u8,
    /// Frames from one key frame to the next, at most.
    pub gop: u32,
    /// B frames in a row; for VP9 and AV1 anything but 0 allows frames that are never shown (alternative references).
    pub b_frames: u8,
    /// Whether x264 shares bits out by macroblock trees. It does by default, but then reads memory that nobody wrote: the
    /// same frames give another stream now and then.
    pub mb_tree: bool,
}

/// What decides how many bits are spent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rate {
    /// Constant quality: the CRF of H.264 and H.265, 0 (best) to 51. VP9 and AV1 have a constant quantizer of 63 in
    /// proportion.
    Crf(u8),
    /// Bits for each pixel on average.
    BitsPerPixel(f32),
}

/// The codecs that clips are degraded by, and how they are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Codecs {
    /// How often each codec is drawn; the frequencies need not sum to 1.
    pub h264: f64,
    pub h265: f64,
    pub vp9: f64,
    pub av1: f64,
    /// Range of the CRF.
    pub crf: (u8, u8),
    /// Probability of a bit rate instead of a constant quality.
    pub rate_controlled: f64,
    /// Range of the bits for each pixel; the logarithm is drawn uniformly.
    pub bits_per_pixel: (f32, f32),
    /// Range of the effort.
    pub effort: (u8, u8),
    /// Range of the frames between key frames.
    pub gop: (u32, u32),
    /// Range of the B frames in a row.
    pub b_frames: (u8, u8),
}

/// What streams are made with: mostly H.264, from good to poor quality.
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
        for (name, low, high, least, most) in ranges {
            if !(least <= low && low <= high && high <= most) {
                return wrong(format!(
                    "{name} = {low}..{high}: need {least} <= low <= high <= {most}"
                ));
            }
        }
        Ok(())
    }

    /// How often `kind` is drawn.
    pub fn weight(&self, kind: Kind) -> f64 {
        match kind {
            Kind::H264 => self.h264,
            Kind::H265 => self.h265,
            Kind::Vp9 => self.vp9,
            Kind::Av1 => self.av1,
        }
    }

    /// The same without `kind`.
    pub fn without(mut self, kind: Kind) -> Self {
        match kind {
            Kind::H264 => self.h264 = 0.0,
            Kind::H265 => self.h265 = 0.0,
            Kind::Vp9 => self.vp9 = 0.0,
            Kind::Av1 => self.av1 = 0.0,
        }
        self
    }

    /// A codec from the ranges. It does not check them.
    pub fn draw<R: Rng + ?Sized>(&self, rng: &mut R) -> Codec {
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
    /// Encodes `frames` as a clip of `framerate` frames a second and decodes them again. The frames are of one kind,
    /// I420 or I420_10LE, with even sides of at least 32 pixels. The result depends on the frames and the codec
    /// alone, but for what [`Self::mb_tree`] says.
    ///
    /// # Errors
    /// [`Error::Frame`] for other frames, [`Error::Setting`] when GStreamer lacks the codec or it fails.
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

    /// Sends the frames of `clip` through the codec. They have even sides of at least 32 pixels.
    ///
    /// # Errors
    /// As [`Self::round_trip`].
    pub fn compress(&self, clip: &[Patch]) -> Result<Vec<Patch>> {
        let frame = |picture: &Patch| {
            let mut info = FrameInfo::new(PixelFormat::I420, picture.width, picture.height);
            // The matrix of the luma that models are trained on, whatever the size.
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
        through(&stream, frames, &self.elements(&info, framerate))
    }

    #[cfg(not(feature = "video"))]
    fn send(&self, _: FrameInfo, _: &[Frame], _: u32) -> Result<Vec<Frame>> {
        let name = self.kind.name();
        let text = format!("{name}: this program is built without GStreamer (feature 'video')");
        Err(Error::Setting(text))
    }

    /// Encoder and decoder, as in a launch line. One thread each: many clips are made at a time.
    #[cfg(feature = "video")]
    fn elements(&self, info: &FrameInfo, framerate: u32) -> String {
        let (gop, b, mb_tree) = (self.gop, self.b_frames, self.mb_tree);
        let effort = usize::from(self.effort.min(5));
        let pixels = (info.width * info.height) as f64 * f64::from(framerate);
        let bits = |bpp: f32| (f64::from(bpp) * pixels).max(1000.0);
        let kbits = |bpp: f32| (bits(bpp) / 1000.0).ceil();
        let quantizer = |crf: u8| (u32::from(crf) * 63).div_ceil(51).min(63);
        match self.kind {
            Kind::H264 => {
                let rate = match self.rate {
                    Rate::Crf(crf) => format!("pass=qual quantizer={crf}"),
                    Rate::BitsPerPixel(bpp) => format!("pass=cbr bitrate={}", kbits(bpp)),
                };
                let preset = PRESETS[effort];
                format!(
                    "x264enc {rate} speed-preset={preset} key-int-max={gop} bframes={b} b-adapt=false \
                     mb-tree={mb_tree} threads=1 ! \
                     avdec_h264 max-threads=1"
                )
            }
            Kind::H265 => {
                let rate = match self.rate {
                    Rate::Crf(crf) => format!("crf={crf}"),
                    Rate::BitsPerPixel(bpp) => format!("bitrate={}", kbits(bpp)),
                };
                let preset = PRESETS[effort];
                format!(
                    "x265enc speed-preset={preset} key-int-max={gop} \
                     option-string=\"{rate}:bframes={b}:b-adapt=0:pools=none:frame-threads=1:wpp=0:log-level=none\" ! \
                     h265parse ! avdec_h265 max-threads=1"
                )
            }
            Kind::Vp9 => {
                let rate = match self.rate {
                    Rate::Crf(crf) => {
                        let q = quantizer(crf);
                        format!("min-quantizer={q} max-quantizer={q} target-bitrate=100000000")
                    }
                    Rate::BitsPerPixel(bpp) => format!("target-bitrate={}", bits(bpp).ceil()),
                };
                let hidden = match b {
                    0 => "lag-in-frames=0",
                    _ => "lag-in-frames=16 auto-alt-ref=true",
                };
                format!(
                    "vp9enc {rate} deadline=1000000 cpu-used={} keyframe-max-dist={gop} {hidden} threads=1 ! \
                     vp9dec threads=1",
                    SPEEDS[effort]
                )
            }
            Kind::Av1 => {
                let rate = match self.rate {
                    Rate::Crf(crf) => {
                        let q = quantizer(crf);
                        format!("min-quantizer={q} max-quantizer={q} target-bitrate=100000")
                    }
                    Rate::BitsPerPixel(bpp) => {
                        // On clips as short as these only CBR without a look ahead follows the rate.
                        let rate = kbits(bpp);
                        format!("end-usage=cbr max-quantizer=63 target-bitrate={rate}")
                    }
                };
                let ahead = b > 0 && matches!(self.rate, Rate::Crf(_));
                let hidden = if ahead { 16 } else { 0 };
                format!(
                    "av1enc {rate} cpu-used={} keyframe-max-dist={gop} lag-in-frames={hidden} threads=1 row-mt=false ! \
                     av1parse ! av1dec",
                    SPEEDS[effort] + 2
                )
            }
        }
    }
}

/// The presets of x264 and x265, by effort.
#[cfg(feature = "video")]
const PRESETS: [&str; 6] = [
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
];
/// The `cpu-used` of VP9, by effort.
#[cfg(feature = "video")]
const SPEEDS: [u32; 6] = [8, 7, 6, 5, 4, 3];

#[cfg(all(test, feature = "video"))]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    /// Texture that moves by a pixel a frame.
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

    /// Whether GStreamer has the codec here.
    fn is_there(kind: Kind) -> bool {
        let there = kind.try_out();
        if let Err(e) = &there {
            eprintln!("skipped: {e}");
        }
        there.is_ok()
    }

    /// Mean squared error of luma.
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
    fn every_codec_damages_more_the_lower_its_quality() {
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
    fn frames_inherit_from_each_other_and_the_same_clip_gives_the_same_damage() {
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
    fn ten_bits_stay_ten_bits_where_the_codec_has_them() {
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
    fn codecs_are_drawn_from_their_ranges_which_are_checked() {
        let mut codecs = Codecs {
            h264: 0.0,
            av1: 0.0,
            gop: (5, 9),
            ..Codecs::default()
        };
        codecs.check().unwrap();
        let mut rng = SmallRng::seed_from_u64(1);
        let drawn: Vec<_> = (0..200).map(|_| codecs.draw(&mut rng)).collect();
        let count = |kind| drawn.iter().filter(|c| c.kind == kind).count();
        assert!(count(Kind::H265) > 60 && count(Kind::Vp9) > 60);
        assert_eq!(count(Kind::H265) + count(Kind::Vp9), 200);
        assert!(
            drawn
                .iter()
                .all(|c| (5..=9).contains(&c.gop) && c.b_frames <= 3)
        );
        let crf = |c: &&Codec| matches!(c.rate, Rate::Crf(18..=38));
        let rate =
            |c: &&Codec| matches!(c.rate, Rate::BitsPerPixel(b) if (0.029..0.31).contains(&b));
        let (crf, rate) = (
            drawn.iter().filter(crf).count(),
            drawn.iter().filter(rate).count(),
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
