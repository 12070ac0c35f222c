//! Real codec damage: a clip is encoded and decoded by H.264, H.265, VP9 or AV1, in memory, by GStreamer.
//!
//! Clips, not pictures: what a P or B frame inherits from its neighbours is a part of the damage.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::checkpoint::write_atomically;
use crate::{
    Error, Result,
    frame::{Frame, FrameInfo, PixelFormat},
    video::{StreamInfo, through},
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

/// The codecs that clips are damaged by, and how they are drawn.
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
        let weights = [self.h264, self.h265, self.vp9, self.av1];
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

    /// A codec from the ranges. It does not check them.
    pub fn draw<R: Rng + ?Sized>(&self, rng: &mut R) -> Codec {
        let kinds = [
            (Kind::H264, self.h264),
            (Kind::H265, self.h265),
            (Kind::Vp9, self.vp9),
            (Kind::Av1, self.av1),
        ];
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
        }
    }
}

impl Codec {
    /// Encodes `frames` as a clip of `framerate` frames a second and decodes them again. The frames are of one kind,
    /// I420 or I420_10LE, with even sides of at least 32 pixels. The result depends on the frames and the codec alone.
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
        let stream = StreamInfo::new(*info, Some((framerate, 1)))?;
        through(&stream, frames, &self.elements(info, framerate))
    }

    /// Encoder and decoder, as in a launch line. One thread each: many clips are made at a time.
    fn elements(&self, info: &FrameInfo, framerate: u32) -> String {
        let (gop, b, effort) = (self.gop, self.b_frames, usize::from(self.effort.min(5)));
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
                    "x264enc {rate} speed-preset={preset} key-int-max={gop} bframes={b} b-adapt=false threads=1 ! \
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

/// Round trips that were made before, on disk, found again by the frames and the codec.
///
/// It grows up to its limit and then keeps what it has: runs that are repeated or resumed ask for the same clips in the
/// same order, and find those that came first.
pub struct Cache {
    folder: PathBuf,
    limit: u64,
    used: AtomicU64,
}

impl Cache {
    /// Opens the cache in `folder`, which is made if it does not exist, for at most `limit` bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(folder: &Path, limit: u64) -> Result<Self> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let mut used = 0;
        for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
            let entry = entry.map_err(Error::io(folder))?;
            // A file may have gone since it was listed.
            used += entry.metadata().map_or(0, |m| m.len());
        }
        Ok(Self {
            folder: folder.into(),
            limit,
            used: AtomicU64::new(used),
        })
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// As [`Codec::round_trip`].
    ///
    /// # Errors
    /// Those of the codec; a cache that cannot be read or written only costs time.
    pub fn round_trip(
        &self,
        codec: &Codec,
        frames: &[Frame],
        framerate: u32,
    ) -> Result<Vec<Frame>> {
        let path = self.folder.join(key(codec, frames, framerate));
        if let Some(found) = read(&path, frames) {
            return Ok(found);
        }
        let made = codec.round_trip(frames, framerate)?;
        let bytes: Vec<u8> = made.iter().flat_map(planes).flatten().copied().collect();
        // A damaged file is replaced.
        let before = fs::metadata(&path).map_or(0, |m| m.len());
        let len = (bytes.len() as u64).saturating_sub(before);
        if self.used.fetch_add(len, Ordering::Relaxed) + len > self.limit
            || write_atomically(&path, &bytes).is_err()
        {
            self.used.fetch_sub(len, Ordering::Relaxed);
        }
        Ok(made)
    }
}

fn planes(frame: &Frame) -> impl Iterator<Item = &[u8]> {
    (0..frame.info().format.planes()).map(|p| frame.plane(p))
}

/// What the cache has under `path`: frames like `like`, or nothing.
fn read(path: &Path, like: &[Frame]) -> Option<Vec<Frame>> {
    let bytes = fs::read(path).ok()?;
    let mut rest = &bytes[..];
    let mut frames = like.to_vec();
    for frame in &mut frames {
        for plane in 0..frame.info().format.planes() {
            let plane = frame.plane_mut(plane);
            let (head, tail) = rest.split_at_checked(plane.len())?;
            plane.copy_from_slice(head);
            rest = tail;
        }
    }
    rest.is_empty().then_some(frames)
}

/// The name of a round trip: 128 bits of FNV-1a over everything that it depends on.
fn key(codec: &Codec, frames: &[Frame], framerate: u32) -> String {
    let what = format!(
        "{codec:?} {framerate} {:?} {}",
        frames.first().map(Frame::info),
        gst::version_string()
    );
    let parts = || {
        [what.as_bytes()]
            .into_iter()
            .chain(frames.iter().flat_map(planes))
    };
    let hash = |start: u64| {
        let mix = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        parts().fold(start, |h, part| part.iter().fold(h, mix))
    };
    // Two starts give two hashes: the published one, and its bits turned over.
    let start = 0xcbf2_9ce4_8422_2325;
    format!("{:016x}{:016x}.yuv", hash(start), hash(!start))
}

/// The presets of x264 and x265, by effort.
const PRESETS: [&str; 6] = [
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
];
/// The `cpu-used` of VP9, by effort.
const SPEEDS: [u32; 6] = [8, 7, 6, 5, 4, 3];

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    const KINDS: [Kind; 4] = [Kind::H264, Kind::H265, Kind::Vp9, Kind::Av1];

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
        }
    }

    /// Whether GStreamer has the codec here.
    fn is_there(kind: Kind) -> bool {
        gst::init().unwrap();
        let line = codec(kind, 20).elements(clip(1, PixelFormat::I420)[0].info(), 25);
        let there = gst::parse::bin_from_description(&line, true).is_ok();
        if !there {
            eprintln!("skipped: GStreamer has no {kind:?} here");
        }
        there
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
        for kind in KINDS.into_iter().filter(|k| is_there(*k)) {
            let damage = [5, 25, 45]
                .map(|crf| error(&codec(kind, crf).round_trip(&frames, 25).unwrap(), &frames));
            assert!(
                damage[0] < damage[1] && damage[1] < damage[2],
                "{kind:?}: {damage:?}"
            );
            assert!(damage[0] < 10.0 && damage[2] > 50.0, "{kind:?}: {damage:?}");
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
        for kind in KINDS.into_iter().filter(|k| is_there(*k)) {
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
    fn the_cache_gives_the_same_and_stays_within_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let frames = clip(3, PixelFormat::I420);
        let len = 3 * 64 * 48 * 3 / 2;
        let cache = Cache::open(dir.path(), len + 10).unwrap();
        let made = cache
            .round_trip(&codec(Kind::H264, 30), &frames, 25)
            .unwrap();
        assert_eq!(cache.used(), len);
        // The file is what is read: a change in it shows.
        let file = fs::read_dir(dir.path())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        let mut bytes = fs::read(&file).unwrap();
        bytes[0] ^= 1;
        fs::write(&file, &bytes).unwrap();
        let again = cache
            .round_trip(&codec(Kind::H264, 30), &frames, 25)
            .unwrap();
        assert_eq!(again[0].plane(0)[0], made[0].plane(0)[0] ^ 1);
        assert_eq!(again[2].plane(2), made[2].plane(2));
        // A damaged file is made anew, and what does not fit is not kept.
        fs::write(&file, &bytes[1..]).unwrap();
        let again = cache
            .round_trip(&codec(Kind::H264, 30), &frames, 25)
            .unwrap();
        assert_eq!(again[0].plane(0), made[0].plane(0));
        cache
            .round_trip(&codec(Kind::H264, 31), &frames, 25)
            .unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(Cache::open(dir.path(), 0).unwrap().used(), len);
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
