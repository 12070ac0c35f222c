//! The pickle inside a PyTorch checkpoint, read as data.
//!
//! A pickle is a program for a small stack machine that may name any Python function. This machine knows the few
//! instructions and names that weights are written with, refuses all others and runs nothing. Objects are made in
//! lists and referred to by index: an object that holds itself, or is nested a million deep, is only a number, and
//! memory is bounded by the number of instructions.

use std::collections::{BTreeMap, HashMap};

use super::super::container::shown;

/// The largest pickle in bytes; a tensor takes about 200.
pub(super) const MAX_PICKLE: u64 = 4 << 20;

/// The most instructions of a pickle; a tensor takes about 40.
const MAX_INSTRUCTIONS: usize = 500_000;

/// The most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// The longest name of a tensor or storage in bytes.
const MAX_NAME: usize = 200;

/// Entries of a checkpoint that hold the weights, the first that is there is taken.
const STATE_DICTS: [&str; 4] = ["state_dict", "params_ema", "params", "ema"];

/// What a storage holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    BF16,
    I64,
    /// Integers and booleans of other sizes, which no weights are.
    Other(usize),
}

impl Element {
    /// What PyTorch calls a storage of these.
    fn of(storage: &str) -> Option<Self> {
        Some(match storage {
            "DoubleStorage" => Self::F64,
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::BF16,
            "LongStorage" => Self::I64,
            "IntStorage" => Self::Other(4),
            "ShortStorage" => Self::Other(2),
            "CharStorage" | "ByteStorage" | "BoolStorage" => Self::Other(1),
            _ => return None,
        })
    }

    /// Bytes of one.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Other(size) => size,
        }
    }
}

/// A tensor: a view of a storage. Every element lies inside the storage, and there are no more than it has.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub element: Element,
    /// Name of the storage in the archive's folder `data`.
    pub storage: String,
    /// Elements of the storage.
    pub stored: u64,
    /// The first element.
    pub offset: u64,
    pub shape: Vec<usize>,
    /// Elements from one to the next, for each dimension.
    pub strides: Vec<usize>,
}

/// The weights that a checkpoint's pickle describes, by name.
pub(super) fn weights(bytes: &[u8]) -> Result<BTreeMap<String, View>, String> {
    let mut machine = Machine::new(bytes);
    let root = machine.run()?;
    machine.weights(root)
}

/// The functions and types that a pickle may name.
#[derive(Clone, Copy, Debug)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Element),
}

impl Global {
    fn named(module: &str, name: &str) -> Result<Self, String> {
        if let ("torch", Some(element)) = (module, Element::of(name)) {
            return Ok(Self::Storage(element));
        }
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            _ => {
                return Err(format!(
                    "it names '{}.{}', which weights do not need and which could be code; refused, nothing was run. \
                     From a file that you trust, save the weights alone: \
                     torch.save(torch.load(FILE)['state_dict'], NEW_FILE)",
                    shown(module),
                    shown(name)
                ));
            }
        })
    }
}

/// A value on the stack; what is larger is in the machine's lists at the index.
#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    /// A number with a fraction, a truth value, nothing, a list: nothing that weights are found by.
    Other,
    Int(i64),
    Text(&'a str),
    Global(Global),
    Tuple(usize),
    Dict(usize),
    Storage(usize),
    Tensor(usize),
}

struct Machine<'a> {
    rest: &'a [u8],
    stack: Vec<Value<'a>>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    tuples: Vec<Vec<Value<'a>>>,
    dicts: Vec<Vec<(Value<'a>, Value<'a>)>>,
    storages: Vec<(Element, &'a str, u64)>,
    tensors: Vec<View>,
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            rest: bytes,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            tuples: Vec::new(),
            dicts: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// Runs to the end; gives the one object that is left.
    fn run(&mut self) -> Result<Value<'a>, String> {
        for _ in 0..MAX_INSTRUCTIONS {
            match self.byte()? {
                b'.' => return self.pop(),
                code => self.step(code)?,
            }
        }
        Err("a pickle with more instructions than a checkpoint's weights take".into())
    }

    /// One instruction, named as in Python's `pickletools`.
    fn step(&mut self, code: u8) -> Result<(), String> {
        match code {
            // PROTO
            0x80 => match self.byte()? {
                2 => {}
                n => {
                    return Err(format!(
                        "pickle protocol {n}, not 2, which torch.save writes by default"
                    ));
                }
            },
            // MARK
            b'(' => self.marks.push(self.stack.len()),
            // NONE, NEWTRUE, NEWFALSE, EMPTY_LIST
            b'N' | 0x88 | 0x89 | b']' => self.stack.push(Value::Other),
            // BINFLOAT
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Other);
            }
            // BININT, BININT1, BININT2, LONG1
            b'J' => self.integer(4, true)?,
            b'K' => self.integer(1, false)?,
            b'M' => self.integer(2, false)?,
            0x8a => {
                let len = self.byte()?;
                self.integer(len.into(), true)?;
            }
            // BINUNICODE
            b'X' => {
                let len = self.index()?;
                let text = std::str::from_utf8(self.take(len as usize)?);
                self.stack
                    .push(Value::Text(text.map_err(|_| "a name that is no text")?));
            }
            // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
            b')' => self.tuple(0)?,
            0x85..=0x87 => self.tuple(usize::from(code - 0x84))?,
            b't' => {
                let items = self.unmark()?;
                self.push_tuple(items);
            }
            // EMPTY_DICT
            b'}' => self.push_dict(),
            // APPEND, APPENDS: what is in lists is not kept
            b'a' => {
                self.pop()?;
                self.expect_other()?;
            }
            b'e' => {
                self.unmark()?;
                self.expect_other()?;
            }
            // SETITEM, SETITEMS
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(vec![key, value])?;
            }
            b'u' => {
                let items = self.unmark()?;
                self.set(items)?;
            }
            // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
            b'q' => {
                let at = self.byte()?.into();
                self.put(at)?;
            }
            b'r' => {
                let at = self.index()?;
                self.put(at)?;
            }
            b'h' => {
                let at = self.byte()?.into();
                self.get(at)?;
            }
            b'j' => {
                let at = self.index()?;
                self.get(at)?;
            }
            // GLOBAL
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Global(Global::named(module, name)?));
            }
            // BINPERSID, REDUCE, BUILD
            b'Q' => self.storage()?,
            b'R' => self.reduce()?,
            b'b' => {
                // The attributes of a dict, such as PyTorch's `_metadata`, are not kept.
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                    return Err("it sets attributes of something other than a dict".into());
                }
            }
            other => {
                return Err(format!(
                    "instruction 0x{other:02x}, which no PyTorch checkpoint has; refused"
                ));
            }
        }
        Ok(())
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self
            .rest
            .split_at_checked(n)
            .ok_or("a pickle that is cut short")?;
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    /// A number of four bytes.
    fn index(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?.iter().rev();
        Ok(bytes.fold(0, |n, &b| n << 8 | u32::from(b)))
    }

    /// Pushes the little-endian number of the next `len` bytes.
    fn integer(&mut self, len: usize, signed: bool) -> Result<(), String> {
        if len > 8 {
            return Err("a number of more than 8 bytes".into());
        }
        let bytes = self.take(len)?;
        let fill = match bytes.last() {
            Some(b) if signed && b & 0x80 != 0 => 0xff,
            _ => 0,
        };
        let mut wide = [fill; 8];
        wide[..len].copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    /// The text up to the end of the line.
    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.rest.iter().position(|&b| b == b'\n');
        let line = self.take(end.ok_or("a pickle that is cut short")?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "a name that is no text".into())
    }

    /// The top of the stack, above the last mark.
    fn pop(&mut self) -> Result<Value<'a>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(value) if self.stack.len() >= floor => Ok(value),
            _ => Err("a pickle that takes more than it has put".into()),
        }
    }

    /// Everything above the last mark.
    fn unmark(&mut self) -> Result<Vec<Value<'a>>, String> {
        let mark = self.marks.pop().ok_or("a pickle with a missing mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn push_tuple(&mut self, items: Vec<Value<'a>>) {
        self.stack.push(Value::Tuple(self.tuples.len()));
        self.tuples.push(items);
    }

    fn tuple(&mut self, n: usize) -> Result<(), String> {
        let mut items = Vec::with_capacity(n);
        for _ in 0..n {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push_tuple(items);
        Ok(())
    }

    fn push_dict(&mut self) {
        self.stack.push(Value::Dict(self.dicts.len()));
        self.dicts.push(Vec::new());
    }

    fn expect_other(&self) -> Result<(), String> {
        match self.stack.last() {
            Some(Value::Other) => Ok(()),
            _ => Err("it appends to something other than a list".into()),
        }
    }

    /// Adds keys and values, alternating, to the dict on top of the stack.
    fn set(&mut self, items: Vec<Value<'a>>) -> Result<(), String> {
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err("a key without a value".into());
        };
        let dict = match self.stack.last() {
            Some(&Value::Dict(at)) => self.dicts.get_mut(at),
            _ => None,
        };
        let dict = dict.ok_or("it sets items of something other than a dict")?;
        dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn put(&mut self, at: u32) -> Result<(), String> {
        let value = self.pop()?;
        self.stack.push(value);
        self.memo.insert(at, value);
        Ok(())
    }

    fn get(&mut self, at: u32) -> Result<(), String> {
        let value = self.memo.get(&at);
        self.stack
            .push(*value.ok_or("it refers to an object that it has not made")?);
        Ok(())
    }

    /// The items of a tuple.
    fn items(&self, value: Value<'a>) -> Result<&[Value<'a>], String> {
        match value {
            Value::Tuple(at) => Ok(self.tuples.get(at).map_or(&[], Vec::as_slice)),
            _ => Err("something other than a tuple where one must be".into()),
        }
    }

    /// A storage: `("storage", type, key, location, elements)`.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let &[
            Value::Text("storage"),
            Value::Global(Global::Storage(element)),
            Value::Text(key),
            Value::Text(_),
            Value::Int(stored),
        ] = self.items(id)?
        else {
            return Err("a reference outside the pickle that is no storage".into());
        };
        let stored = u64::try_from(stored).map_err(|_| "a storage of negative size")?;
        if key.len() > MAX_NAME {
            return Err("a storage with too long a name".into());
        }
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push((element, key, stored));
        Ok(())
    }

    /// Calls one of the known functions.
    fn reduce(&mut self) -> Result<(), String> {
        let (args, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = function else {
            return Err("it calls something that is no function; refused".into());
        };
        match (function, self.items(args)?) {
            (Global::OrderedDict, []) => self.push_dict(),
            (
                Global::RebuildTensor,
                &[
                    Value::Storage(storage),
                    Value::Int(offset),
                    shape,
                    strides,
                    _,
                    _,
                ]
                | &[
                    Value::Storage(storage),
                    Value::Int(offset),
                    shape,
                    strides,
                    _,
                    _,
                    _,
                ],
            ) => {
                let view = self.view(storage, offset, shape, strides)?;
                self.stack.push(Value::Tensor(self.tensors.len()));
                self.tensors.push(view);
            }
            (Global::RebuildParameter, &[tensor @ Value::Tensor(_), _, _]) => {
                self.stack.push(tensor);
            }
            (function, _) => {
                return Err(format!(
                    "it calls {function:?} with arguments that do not fit"
                ));
            }
        }
        Ok(())
    }

    /// The numbers of a tuple, each at least 0.
    fn numbers(&self, tuple: Value<'a>) -> Result<Vec<usize>, String> {
        let number = |v: &Value| match *v {
            Value::Int(n) => usize::try_from(n).ok(),
            _ => None,
        };
        let items = self.items(tuple)?;
        if items.len() > MAX_RANK {
            return Err(format!("a tensor of {} dimensions", items.len()));
        }
        let numbers = items.iter().map(number).collect::<Option<_>>();
        numbers.ok_or_else(|| "a shape or stride that is no number of at least 0".into())
    }

    fn view(
        &self,
        storage: usize,
        offset: i64,
        shape: Value<'a>,
        strides: Value<'a>,
    ) -> Result<View, String> {
        let (shape, strides) = (self.numbers(shape)?, self.numbers(strides)?);
        let found = self.storages.get(storage);
        let &(element, key, stored) = found.ok_or("a tensor without a storage")?;
        let outside = || {
            format!(
                "a tensor of shape {shape:?}, strides {strides:?}, offset {offset} does not fit in its storage of {stored} elements"
            )
        };
        if shape.len() != strides.len() {
            return Err(outside());
        }
        let offset = u64::try_from(offset).map_err(|_| outside())?;
        let count = product(&shape).filter(|&n| n <= stored);
        let count = count.ok_or_else(outside)?;
        let steps = shape.iter().zip(&strides);
        let mut steps = steps.map(|(&n, &s)| (n as u64 - 1).checked_mul(s as u64));
        // One past the last element.
        let end = match count {
            0 => Some(offset),
            _ => steps.try_fold(offset + 1, |end, step| end.checked_add(step?)),
        };
        if end.is_none_or(|end| end > stored) {
            return Err(outside());
        }
        Ok(View {
            element,
            storage: key.to_string(),
            stored,
            offset,
            shape,
            strides,
        })
    }

    /// The tensors of the state dict in `root`.
    fn weights(self, root: Value<'a>) -> Result<BTreeMap<String, View>, String> {
        let dict = |value: Value| match value {
            Value::Dict(at) => self.dicts.get(at),
            _ => None,
        };
        let root = dict(root).ok_or("it holds no state dict")?;
        let under = |name: &&str| {
            let entry = root
                .iter()
                .find(|(k, _)| matches!(k, Value::Text(t) if t == name));
            entry.and_then(|&(_, value)| dict(value))
        };
        let state = STATE_DICTS.iter().find_map(under).unwrap_or(root);
        let mut weights = BTreeMap::new();
        for (key, value) in state {
            let (Value::Text(name), Value::Tensor(at)) = (key, value) else {
                continue;
            };
            let Some(view) = self.tensors.get(*at) else {
                continue;
            };
            if name.len() > MAX_NAME {
                return Err(format!("a tensor with too long a name: {}", shown(name)));
            }
            if weights.insert(name.to_string(), view.clone()).is_some() {
                return Err(format!("tensor '{}' is there twice", shown(name)));
            }
        }
        if weights.is_empty() {
            let text = |(k, _): &(Value, Value)| match k {
                Value::Text(t) => Some(shown(t)),
                _ => None,
            };
            let keys: Vec<_> = root.iter().filter_map(text).take(8).collect();
            return Err(format!(
                "no weights at the top or under {}; there is: {}",
                STATE_DICTS.join(", "),
                keys.join(", ")
            ));
        }
        Ok(weights)
    }
}

/// Elements of a tensor; none when there are more than can be counted.
pub(super) fn product(shape: &[usize]) -> Option<u64> {
    // A dimension of 0 does not excuse the others.
    let sized = shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d.max(1) as u64))?;
    Some(if shape.contains(&0) { 0 } else { sized })
}
