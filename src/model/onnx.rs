//! Export of lite models as ONNX files, for other runtimes.
//!
//! An ONNX model is a protocol buffer: numbered fields with variable-length integers, four-byte
//! floats or counted bytes. A few lines here encode them. Field numbers are those of `onnx.proto`
//! version 1.

use super::LiteModel;
use crate::nn::lite::{Activated, Condition, LEAKY_SLOPE, LatentKind, Role, latent::chroma_slot};

/// Versions of the file format and of the operators: those of ONNX 1.13, which all current runtimes
/// read.
const IR_VERSION: u64 = 8;
const OPSET: u64 = 18;

/// Inputs and outputs of an exported network, all f32 `[n, c, height, width]` of any height and
/// width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnnxEnds {
    /// The network alone, from `latent` to `residual`, both whitened. Convolutions pad with zeros.
    Latent,
    /// From the planes of the bicubic base to the upscaled planes: `y` to `y_out` and, for a model
    /// with chroma, `u` to `u_out` and `v` to `v_out` at half the size. Sides are multiples of r.
    /// Borders are repeated as in the engine. Values are not clamped.
    Planes,
    /// From the planes of a picture of any size to the upscaled planes: `y` to `y_out` and, for a
    /// model with chroma, `u` to `u_out` and `v` to `v_out` at half the size, rounded up. Chroma is
    /// sited in the centre of its luma samples. The network contains the bicubic interpolation. The
    /// scale is a whole number. Otherwise as [`Self::Planes`].
    Picture,
}

impl LiteModel {
    /// Returns the bytes of an ONNX file of the model at `scale`, without its memory.
    pub fn to_onnx(&self, scale: f64, ends: OnnxEnds) -> Vec<u8> {
        let model = &self.without_memory();
        let mut graph = Graph::default();
        let channels = self.stats.input_mean.len();
        match ends {
            OnnxEnds::Latent => {
                graph.input("latent", channels);
                let residual = graph.network(model, scale, "latent");
                graph.node("Identity", &[&residual], &["residual"], &[]);
                graph.output("residual", channels);
            }
            OnnxEnds::Planes => graph.planes(model, scale, false),
            OnnxEnds::Picture => graph.planes(model, scale, true),
        }
        let mut opset = Message::default();
        opset.text(1, "").number(2, OPSET);
        let mut file = Message::default();
        file.number(1, IR_VERSION)
            .text(2, "tadsr")
            .text(3, env!("CARGO_PKG_VERSION"))
            .message(7, &graph.finish(&self.metadata.name))
            .message(8, &opset);
        for (key, value) in [
            ("scale", scale.to_string()),
            ("licence", self.metadata.licence.clone()),
            ("color", self.metadata.color.clone()),
        ] {
            let mut entry = Message::default();
            entry.text(1, key).text(2, &value);
            file.message(14, &entry);
        }
        file.0
    }
}

/// The encoded bytes of a message.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(&mut self, field: u64, value: u64) -> &mut Self {
        self.varint(field << 3);
        self.varint(value);
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) -> &mut Self {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    fn text(&mut self, field: u64, text: &str) -> &mut Self {
        self.bytes(field, text.as_bytes())
    }

    fn message(&mut self, field: u64, message: &Message) -> &mut Self {
        self.bytes(field, &message.0)
    }
}

/// An attribute of a node.
enum Attribute<'a> {
    Float(f32),
    Int(i64),
    Ints(&'a [i64]),
    Text(&'a str),
}

impl Attribute<'_> {
    fn message(&self, name: &str) -> Message {
        let mut message = Message::default();
        message.text(1, name);
        // Field 20 is the type.
        match self {
            Self::Float(v) => message.float(2, *v).number(20, 1),
            Self::Int(v) => message.number(3, *v as u64).number(20, 2),
            Self::Text(v) => message.text(4, v).number(20, 3),
            Self::Ints(v) => {
                v.iter().for_each(|v| _ = message.number(8, *v as u64));
                message.number(20, 7)
            }
        };
        message
    }
}

/// A graph under construction.
#[derive(Default)]
struct Graph {
    /// Encoded fields of the message, in any order.
    fields: Message,
}

impl Graph {
    fn finish(mut self, name: &str) -> Message {
        self.fields.text(2, name);
        self.fields
    }

    fn node(
        &mut self,
        kind: &str,
        inputs: &[&str],
        outputs: &[&str],
        attributes: &[(&str, Attribute)],
    ) {
        let mut node = Message::default();
        inputs.iter().for_each(|name| _ = node.text(1, name));
        outputs.iter().for_each(|name| _ = node.text(2, name));
        node.text(3, outputs[0]).text(4, kind);
        for (name, attribute) in attributes {
            node.message(5, &attribute.message(name));
        }
        self.fields.message(1, &node);
    }

    /// Adds a constant of the type with ONNX's number `kind`.
    fn constant(&mut self, name: &str, dims: &[usize], kind: u64, bytes: &[u8]) {
        let mut tensor = Message::default();
        dims.iter().for_each(|d| _ = tensor.number(1, *d as u64));
        tensor.number(2, kind).text(8, name).bytes(9, bytes);
        self.fields.message(5, &tensor);
    }

    fn floats(&mut self, name: &str, dims: &[usize], values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constant(name, dims, 1, &bytes);
    }

    fn ints(&mut self, name: &str, values: &[i64]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constant(name, &[values.len()], 7, &bytes);
    }

    fn input(&mut self, name: &str, channels: usize) {
        self.fields.message(11, &value(name, channels));
    }

    fn output(&mut self, name: &str, channels: usize) {
        self.fields.message(12, &value(name, channels));
    }

    /// Adds the layers from the tensor `x`. Returns the name of the residual.
    fn network(&mut self, model: &LiteModel, scale: f64, x: &str) -> String {
        let (mut x, mut skip) = (x.to_string(), String::new());
        for layer in &model.layers {
            let spec = &layer.spec;
            let name = |part: &str| format!("{}.{part}", spec.name);
            let (weight, bias) = layer.fold(&Condition::at(scale), model.metadata.student.r);
            self.floats(&name("weight"), &[spec.co, spec.ci, 3, 3], &weight);
            self.floats(&name("bias"), &[spec.co], &bias);
            let attributes = [
                ("kernel_shape", Attribute::Ints(&[3, 3])),
                ("pads", Attribute::Ints(&[1, 1, 1, 1])),
            ];
            let mut y = name("conv");
            self.node(
                "Conv",
                &[&x, &name("weight"), &name("bias")],
                &[&y],
                &attributes,
            );
            if spec.activated == Activated::Leaky {
                let activated = name("activated");
                let alpha = [("alpha", Attribute::Float(LEAKY_SLOPE))];
                self.node("LeakyRelu", &[&y], &[&activated], &alpha);
                y = activated;
            }
            match spec.role {
                Role::Chain => {}
                Role::PairFirst => skip.clone_from(&x),
                Role::PairSecond => {
                    self.node("Add", &[&skip, &y], &[&name("sum")], &[]);
                    y = name("sum");
                }
            }
            x = y;
        }
        x
    }

    /// Adds the interpolation of a plane of a picture, `{plane}.base`, and its size,
    /// `{plane}.size`.
    /// Luma comes before chroma, of which a cell has `r` x `r` samples. Returns the name of the
    /// widths of the border at all sides, which fills up the last grid cells.
    fn interpolation(
        &mut self,
        plane: &str,
        scale: f64,
        (cell, r): (usize, usize),
        margin: i64,
    ) -> String {
        let of = |part: &str| format!("{plane}.{part}");
        let attributes = [
            ("mode", Attribute::Text("cubic")),
            (
                "coordinate_transformation_mode",
                Attribute::Text("half_pixel"),
            ),
            ("cubic_coeff_a", Attribute::Float(-0.75)),
        ];
        self.floats(&of("scales"), &[4], &[1.0, 1.0, scale as f32, scale as f32]);
        let is_luma = plane == "y";
        let resized = of(if is_luma { "base" } else { "resized" });
        self.node(
            "Resize",
            &[plane, "", &of("scales")],
            &[&resized],
            &attributes,
        );
        if is_luma {
            self.ints("sides.from", &[2]);
            self.ints("sides.to", &[4]);
            self.ints("corner", &[0, 0]);
            self.ints("cell", &[cell as i64]);
            self.ints("cell.rest", &[cell as i64 - 1]);
            self.node("Shape", &["y.base"], &["y.shape"], &[]);
            self.node(
                "Slice",
                &["y.shape", "sides.from", "sides.to"],
                &["y.size"],
                &[],
            );
            self.node("Add", &["y.size", "cell.rest"], &["y.more"], &[]);
            self.node("Div", &["y.more", "cell"], &["cells.count"], &[]);
        } else {
            self.ints(&of("one"), &[1]);
            self.ints(&of("two"), &[2]);
            self.node("Add", &["y.size", &of("one")], &[&of("more")], &[]);
            self.node("Div", &[&of("more"), &of("two")], &[&of("size")], &[]);
            let part = [resized.as_str(), "corner", &of("size"), "axes"];
            self.node("Slice", &part, &[&of("base")], &[]);
        }
        self.ints(&of("r"), &[r as i64]);
        self.node("Mul", &["cells.count", &of("r")], &[&of("whole")], &[]);
        self.node("Sub", &[&of("whole"), &of("size")], &[&of("rest")], &[]);
        let pad = margin * r as i64;
        self.ints(&of("before"), &[0, 0, pad, pad, 0, 0]);
        self.ints(&of("least"), &[pad, pad]);
        self.node("Add", &[&of("rest"), &of("least")], &[&of("after")], &[]);
        let axis = [("axis", Attribute::Int(0))];
        self.node(
            "Concat",
            &[&of("before"), &of("after")],
            &[&of("margin")],
            &axis,
        );
        of("margin")
    }

    /// Adds the network from planes to planes: from those of a picture or of its base.
    fn planes(&mut self, model: &LiteModel, scale: f64, is_picture: bool) {
        let (student, stats) = (&model.metadata.student, &model.stats);
        let (r, channels) = (student.r, stats.input_mean.len());
        // Name, factor, first channel.
        let mut planes = vec![("y", r, 0)];
        if student.latent == LatentKind::Yuv {
            let slots = [0, 1].map(|which| chroma_slot(r, which));
            planes.extend(
                ["u", "v"]
                    .into_iter()
                    .zip(slots)
                    .map(|(n, s)| (n, s.r, s.channel)),
            );
        }
        let margin = model.layers.len() as i64;
        let of = |plane: &str, part: &str| format!("{plane}.{part}");
        let base = |plane: &str| match is_picture {
            true => of(plane, "base"),
            false => plane.to_string(),
        };
        self.ints("axes", &[2, 3]);
        for &(plane, factor, _) in &planes {
            self.input(plane, 1);
            let widths = if is_picture {
                self.interpolation(plane, scale, (r, factor), margin)
            } else {
                let pad = margin * factor as i64;
                self.ints(&of(plane, "margin"), &[0, 0, pad, pad, 0, 0, pad, pad]);
                of(plane, "margin")
            };
            let edge = [("mode", Attribute::Text("edge"))];
            self.node(
                "Pad",
                &[&base(plane), &widths],
                &[&of(plane, "padded")],
                &edge,
            );
            let blocks = [("blocksize", Attribute::Int(factor as i64))];
            self.node(
                "SpaceToDepth",
                &[&of(plane, "padded")],
                &[&of(plane, "cells")],
                &blocks,
            );
        }
        let cells: Vec<String> = planes.iter().map(|p| of(p.0, "cells")).collect();
        let cells: Vec<&str> = cells.iter().map(String::as_str).collect();
        self.node("Concat", &cells, &["cells"], &[("axis", Attribute::Int(1))]);
        let dims = [1, channels, 1, 1];
        self.floats("input_mean", &dims, &stats.input_mean);
        self.floats("input_std", &dims, &stats.input_std);
        self.floats("residual_std", &dims, &stats.residual_std);
        self.node("Sub", &["cells", "input_mean"], &["centred"], &[]);
        self.node("Div", &["centred", "input_std"], &["latent"], &[]);
        let residual = self.network(model, scale, "latent");
        self.ints("first", &[margin, margin]);
        self.ints("end", &[-margin, -margin]);
        self.node(
            "Slice",
            &[&residual, "first", "end", "axes"],
            &["inside"],
            &[],
        );
        self.node("Mul", &["inside", "residual_std"], &["residual"], &[]);
        for &(plane, r, channel) in &planes {
            self.ints(&of(plane, "from"), &[channel as i64]);
            self.ints(&of(plane, "to"), &[(channel + r * r) as i64]);
            self.ints(&of(plane, "axis"), &[1]);
            let part = [
                "residual",
                &of(plane, "from"),
                &of(plane, "to"),
                &of(plane, "axis"),
            ];
            self.node("Slice", &part, &[&of(plane, "channels")], &[]);
            let blocks = [("blocksize", Attribute::Int(r as i64))];
            let mut out = of(plane, "residual");
            self.node("DepthToSpace", &[&of(plane, "channels")], &[&out], &blocks);
            if is_picture {
                let part = [&out, "corner", &of(plane, "size"), "axes"];
                self.node("Slice", &part, &[&of(plane, "shown")], &[]);
                out = of(plane, "shown");
            }
            let sum = format!("{plane}_out");
            self.node("Add", &[&base(plane), &out], &[&sum], &[]);
            if is_picture {
                self.fields.message(12, &named_value(&sum, 1, &sum));
            } else {
                self.output(&sum, 1);
            }
        }
    }
}

/// Returns name and shape of an input or output: any number of images of any size. Planes of equal
/// size share the names of their sides.
fn value(name: &str, channels: usize) -> Message {
    named_value(name, channels, name.trim_end_matches("_out"))
}

/// Returns name and shape of an input or output whose sides are called after `size`.
fn named_value(name: &str, channels: usize, size: &str) -> Message {
    let mut shape = Message::default();
    for (letter, fixed) in [
        ("n", None),
        ("c", Some(channels)),
        ("height", None),
        ("width", None),
    ] {
        let mut dim = Message::default();
        match fixed {
            Some(size) => dim.number(1, size as u64),
            None if letter == "n" => dim.text(2, "n"),
            None => dim.text(2, &format!("{letter}_{size}")),
        };
        shape.message(1, &dim);
    }
    let mut tensor = Message::default();
    tensor.number(1, 1).message(2, &shape);
    let mut kind = Message::default();
    kind.message(1, &tensor);
    let mut value = Message::default();
    value.text(1, name).message(2, &kind);
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::lite::Condition;

    /// Decodes the fields of a message: number, and integer or bytes.
    fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, &[u8])> {
        fn varint(bytes: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let (first, rest) = bytes.split_first().unwrap();
                *bytes = rest;
                value |= u64::from(first & 0x7f) << shift;
                if first & 0x80 == 0 {
                    break;
                }
            }
            value
        }
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let (number, payload) = match key & 7 {
                0 => (varint(&mut bytes), &bytes[..0]),
                wire => {
                    let len = if wire == 5 {
                        4
                    } else {
                        varint(&mut bytes) as usize
                    };
                    let (payload, rest) = bytes.split_at(len);
                    bytes = rest;
                    (0, payload)
                }
            };
            found.push((key >> 3, number, payload));
        }
        found
    }

    fn sub(message: &[u8], field: u64) -> Vec<&[u8]> {
        let all = fields(message).into_iter();
        all.filter(|f| f.0 == field).map(|f| f.2).collect()
    }

    fn text(message: &[u8], field: u64) -> String {
        String::from_utf8(sub(message, field)[0].to_vec()).unwrap()
    }

    #[test]
    fn the_file_has_all_layers_and_every_name_is_defined() {
        for model in ["tiny-x2", "tiny-x4", "small-x4"] {
            let model = LiteModel::find(model).unwrap().remove(0);
            let model = model.folded(&Condition::at(2.0));
            for ends in [OnnxEnds::Latent, OnnxEnds::Planes, OnnxEnds::Picture] {
                let bytes = model.to_onnx(2.0, ends);
                assert_eq!(fields(&bytes)[0], (1, IR_VERSION, &[][..]));
                let graph = sub(&bytes, 7)[0];
                let nodes = sub(graph, 1);
                let convs = nodes.iter().filter(|n| text(n, 4) == "Conv").count();
                assert_eq!(convs, model.layers.len());
                let constants = sub(graph, 5);
                let mut known: Vec<String> = constants.iter().map(|c| text(c, 8)).collect();
                known.extend(sub(graph, 11).iter().map(|v| text(v, 1)));
                for node in nodes {
                    for input in sub(node, 1) {
                        let input = String::from_utf8(input.to_vec()).unwrap();
                        // Optional inputs may have no name.
                        assert!(input.is_empty() || known.contains(&input), "{input}");
                    }
                    known.push(text(node, 2));
                }
                sub(graph, 12)
                    .iter()
                    .for_each(|v| assert!(known.contains(&text(v, 1))));
                let weight = constants
                    .iter()
                    .find(|c| text(c, 8) == "tail.weight")
                    .unwrap();
                let values = sub(weight, 9)[0].chunks_exact(4);
                let values = values.map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                assert!(values.eq(model.layers.last().unwrap().weight.iter().copied()));
            }
        }
    }
}
