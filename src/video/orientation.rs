//! Rotation of the display that H.264 and H.265 streams state in a message (ITU-T H.264 and H.265,
//! annex D: display orientation SEI). GStreamer's parsers do not read it.

/// Turn of the decoded frames by quarters, after a mirroring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turn {
    is_mirrored: bool,
    /// Quarter turns against the clock, 0 to 3.
    quarters: u8,
}

impl Turn {
    /// Returns the value of the property `video-direction` of the element `videoflip`.
    pub fn direction(self) -> &'static str {
        match (self.is_mirrored, self.quarters) {
            (false, 0) => "identity",
            (false, 1) => "90l",
            (false, 2) => "180",
            (false, _) => "90r",
            (true, 0) => "horiz",
            (true, 1) => "ur-ll",
            (true, 2) => "vert",
            (true, _) => "ul-lr",
        }
    }

    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

impl std::fmt::Display for Turn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mirrored = if self.is_mirrored { ", mirrored" } else { "" };
        write!(f, "{} degrees{mirrored}", 90 * u32::from(self.quarters))
    }
}

/// Reader of the packets of a stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Syntax {
    is_h265: bool,
    /// Bytes of the length before each unit; `None` for start codes.
    length: Option<usize>,
}

impl Syntax {
    /// Returns the syntax of a stream with `caps`; `None` for other codecs.
    pub fn of(caps: &gst::CapsRef) -> Option<Self> {
        let structure = caps.structure(0)?;
        let (is_h265, place) = match structure.name().as_str() {
            "video/x-h264" => (false, 4),
            "video/x-h265" => (true, 21),
            _ => return None,
        };
        let is_plain = structure.get::<&str>("stream-format") == Ok("byte-stream");
        let config = structure.get::<gst::Buffer>("codec_data").ok();
        let config = config.filter(|_| !is_plain);
        let config = config.and_then(|config| config.map_readable().ok()?.get(place).copied());
        Some(Self {
            is_h265,
            length: config.map(|byte| usize::from(byte & 3) + 1),
        })
    }

    /// Returns the turn that the message in `packet` states, if there is one.
    pub fn turn(self, packet: &[u8]) -> Option<Turn> {
        let mut rest = packet;
        while let Some(unit) = self.next_unit(&mut rest) {
            let first = *unit.first()?;
            // Messages come before the picture.
            let (is_picture, is_message, header) = if self.is_h265 {
                let kind = first >> 1 & 0x3F;
                (kind < 32, kind == 39, 2)
            } else {
                let kind = first & 0x1F;
                ((1..=5).contains(&kind), kind == 6, 1)
            };
            if is_picture {
                return None;
            }
            if is_message && let Some(turn) = self.message(unit.get(header..)?) {
                return Some(turn);
            }
        }
        None
    }

    /// Returns the next unit of `rest`, without its start code or length.
    fn next_unit<'a>(self, rest: &mut &'a [u8]) -> Option<&'a [u8]> {
        let data = *rest;
        if let Some(size) = self.length {
            let length = data
                .get(..size)?
                .iter()
                .fold(0, |sum, b| sum << 8 | usize::from(*b));
            let unit = data.get(size..size.checked_add(length)?)?;
            *rest = &data[size + length..];
            return Some(unit);
        }
        let code = |data: &[u8]| data.windows(3).position(|bytes| bytes == [0, 0, 1]);
        let start = code(data)? + 3;
        // A picture is long, and its end does not matter.
        let unit = &data[start..];
        let near = &unit[..unit.len().min(1 << 12)];
        let end = code(near).unwrap_or(near.len());
        *rest = &unit[end..];
        Some(&unit[..end])
    }

    /// Reads the messages of a unit.
    fn message(self, unit: &[u8]) -> Option<Turn> {
        const DISPLAY_ORIENTATION: usize = 47;
        // Without the bytes that prevent start codes.
        let mut bytes = Vec::with_capacity(unit.len());
        let mut zeros = 0;
        for &byte in unit {
            if zeros >= 2 && byte == 3 {
                zeros = 0;
                continue;
            }
            zeros = if byte == 0 { zeros + 1 } else { 0 };
            bytes.push(byte);
        }
        let mut rest = &bytes[..];
        while rest.len() > 2 {
            let (kind, size) = (number(&mut rest)?, number(&mut rest)?);
            let message = rest.get(..size)?;
            rest = &rest[size..];
            if kind == DISPLAY_ORIENTATION {
                return turn_of(message);
            }
        }
        None
    }
}

/// Reads a number that consists of bytes 255 and a last byte.
fn number(rest: &mut &[u8]) -> Option<usize> {
    let mut sum = 0;
    loop {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        sum += usize::from(byte);
        if byte != 255 {
            return Some(sum);
        }
    }
}

fn turn_of(message: &[u8]) -> Option<Turn> {
    let bytes: [u8; 3] = message.get(..3)?.try_into().ok()?;
    let bits = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]);
    let bit = |n: u32| bits >> (23 - n) & 1 == 1;
    if bit(0) {
        return Some(Turn::default());
    }
    let turn = bits >> 5 & 0xFFFF;
    let quarters = (turn + 0x2000) / 0x4000;
    // Mirroring in both directions is half a turn.
    let quarters = quarters + if bit(2) { 2 } else { 0 };
    Some(Turn {
        is_mirrored: bit(1) != bit(2),
        quarters: (quarters % 4) as u8,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_before_the_picture_states_the_turn() {
        let plain = Syntax {
            is_h265: false,
            length: None,
        };
        // No mirroring, a quarter of 65536, repetition period 1: bits 0 0 0, 16 bits, 010, 0.
        let message = [47, 4, 0x08, 0x00, 0x08, 0x40, 0x80];
        let unit = |kind: u8, content: &[u8]| [&[0, 0, 0, 1, kind], content].concat();
        let packet = [unit(9, &[0xF0]), unit(6, &message), unit(0x65, &[1, 2])].concat();
        let turn = plain.turn(&packet).unwrap();
        assert_eq!(turn.direction(), "90l");
        assert_eq!(turn.to_string(), "90 degrees");
        let late = [unit(0x65, &[1, 2]), unit(6, &message)].concat();
        assert_eq!(plain.turn(&late), None);
        let lengths = Syntax {
            length: Some(4),
            ..plain
        };
        let packet = [&[0, 0, 0, 8, 6][..], &message].concat();
        assert_eq!(lengths.turn(&packet), Some(turn));
        let h265 = Syntax {
            is_h265: true,
            length: None,
        };
        // Mirrored in both directions.
        let message = [47, 3, 0x60, 0x00, 0x10, 0x80];
        let packet = [&[0, 0, 1, 39 << 1, 1][..], &message, &[0, 0, 1, 0, 1]].concat();
        assert_eq!(h265.turn(&packet).unwrap().direction(), "180");
        for end in 0..packet.len() {
            // Damaged data is not an error.
            let _ = h265.turn(&packet[..end]);
        }
    }
}
