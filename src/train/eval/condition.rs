//! Degradation of the input of an evaluation.

use std::{fmt, str::FromStr};

#[cfg(feature = "video")]
use crate::train::degradation::codec::{Codec, Rate};
use crate::train::degradation::{DegradationRecipe, codec::Kind};

/// Degradation of a low-resolution image or clip. As text: `clean`, `jpeg60` (JPEG of a quality of
/// 1 to 100), `h264-23`, `h265-28`, `vp9-32`, `av1-32` (a codec and its CRF, 0 to 51).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Condition {
    Clean,
    /// JPEG quality, for images.
    Jpeg(u8),
    /// Codec and CRF, for clips.
    Codec(Kind, u8),
}

/// Frames from one key frame to the next, the default of x264.
#[cfg(feature = "video")]
pub(super) const GOP: u32 = 250;

impl Condition {
    /// Returns `true` if images are measured under this condition.
    pub fn is_for_pictures(self) -> bool {
        matches!(self, Self::Clean | Self::Jpeg(_))
    }

    /// Returns `true` if clips are measured under this condition.
    pub fn is_for_clips(self) -> bool {
        !matches!(self, Self::Jpeg(_))
    }

    /// Degradation recipe of an image: antialiased Catmull-Rom, then JPEG.
    pub(super) fn recipe(self) -> DegradationRecipe {
        match self {
            Self::Jpeg(quality) => DegradationRecipe::jpeg(quality),
            _ => DegradationRecipe::fixed(),
        }
    }

    /// Codec of a clip: the medium preset of the encoder with three B frames.
    #[cfg(feature = "video")]
    pub(super) fn codec(self) -> Option<Codec> {
        let Self::Codec(kind, crf) = self else {
            return None;
        };
        Some(Codec {
            kind,
            rate: Rate::Crf(crf),
            effort: 5,
            gop: GOP,
            b_frames: 3,
            mb_tree: true,
        })
    }
}

impl FromStr for Condition {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        if s == "clean" {
            return Ok(Self::Clean);
        }
        if let Some(Ok(quality @ 1..=100)) = s.strip_prefix("jpeg").map(str::parse) {
            return Ok(Self::Jpeg(quality));
        }
        if let Some((name, crf)) = s.split_once('-')
            && let Some(kind) = Kind::of_key(name)
            && let Ok(crf @ 0..=51) = crf.parse()
        {
            return Ok(Self::Codec(kind, crf));
        }
        let codecs = Kind::ALL.map(|kind| format!("{}-C", kind.key()));
        Err(format!(
            "use clean, jpegQ with a quality Q of 1 to 100, or one of {} with a CRF C of 0 to 51",
            codecs.join(", ")
        ))
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clean => f.write_str("clean"),
            Self::Jpeg(quality) => write!(f, "jpeg{quality}"),
            Self::Codec(kind, crf) => write!(f, "{}-{crf}", kind.key()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_read_as_they_are_written_and_wrong_ones_refused() {
        for text in [
            "clean", "jpeg1", "jpeg100", "h264-0", "h265-51", "vp9-32", "av1-23",
        ] {
            assert_eq!(text.parse::<Condition>().unwrap().to_string(), text);
        }
        for wrong in [
            "", "jpeg", "jpeg0", "jpeg101", "webp60", "h264", "h264-52", "h266-20",
        ] {
            assert!(wrong.parse::<Condition>().is_err(), "{wrong}");
        }
    }
}
