//! The pickle of a PyTorch checkpoint, read as data.
//!
//! A pickle is a program for a small stack machine that may call any Python function. This machine
//! supports the few instructions and names of weights, refuses all others and calls nothing.
//! Objects are stored in lists and referenced by index. So cycles and deep nesting cost no stack,
//! and memory is bounded by the number of instructions.

use std::collections::{BTreeMap, HashMap};

use super::super::container::shown;

/// Maximum length of a pickle in bytes. A tensor takes about 200.
pub(super) const MAX_PICKLE: u64 = 4 << 20;

/// Maximum number of instructions. A tensor takes about 40.
const MAX_INSTRUCTIONS: usize = 500_000;

/// Maximum number of dimensions of a tensor.
const MAX_RANK: usize = 8;

/// Maximum length of the name of a tensor or storage in bytes.
const MAX_NAME: usize = 200;

/// Keys of the weights in a checkpoint. The first that exists is used.
const STATE_DICTS: [&str; 4] = ["state_dict", "params_ema", "params", "ema"];

/// Type of the elements of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    BF16,
    I64,
    /// Integers and booleans of other sizes, which weights do not have.
    Other(usize),
}

impl Element {
    /// Returns the type of PyTorch's storage class `storage`.
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

    /// Returns the bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Other(size) => size,
        }
    }
}

/// A tensor, which is a view of a storage. Its elements lie inside the storage, and it has at most
/// as many elements as the storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    pub element: Element,
    /// Name of the storage in the archive's folder `data`.
    pub storage: String,
    /// Elements of the storage.
    pub stored: u64,
    /// Index of the first element.
    pub offset: u64,
    pub shape: Vec<usize>,
    /// Distance of adjacent elements in each dimension.
    pub strides: Vec<usize>,
}

/// Returns the weights that a checkpoint's pickle describes, by name.
pub(super) fn weights(bytes: &[u8]) -> Result<BTreeMap<String, View>, String> {
    let mut machine = Machine::new(bytes);
    let root = machine.run()?;
    machine.weights(root)
}

/// Functions and types that a pickle may use.
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
                    "it names '{}.{}', which weights do not need and which could be code; refused, \
                     nothing was run. From a file that you trust, save only the weights: \
                     torch.save(torch.load(FILE)['state_dict'], NEW_FILE)",
                    shown(module),
                    shown(name)
                ));
            }
        })
    }
}

/// A value on the stack. Larger values are in the machine's lists at the index.
#[derive(Clone, Copy, Debug)]
enum Value<'a> {
    /// A float, boolean, None or list, whose value weights do not need.
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

    /// Runs the pickle and returns its object.
    fn run(&mut self) -> Result<Value<'a>, String> {
        for _ in 0..MAX_INSTRUCTIONS {
            match self.byte()? {
                b'.' => return self.pop(),
                code => self.step(code)?,
            }
        }
        Err("a pickle with more instructions than the weights of a checkpoint need".into())
    }

    /// Runs one instruction. Comments have the names of Python's `pickletools`.
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
                    .push(Value::Text(text.map_err(|_| "a name that is not text")?));
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
            // APPEND, APPENDS: items of lists are dropped
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
                // Attributes of a dict, such as PyTorch's `_metadata`, are dropped.
                self.pop()?;
                if !matches!(self.stack.last(), Some(Value::Dict(_))) {
                    return Err("it sets attributes of an object that is not a dict".into());
                }
            }
            other => {
                return Err(format!(
                    "instruction 0x{other:02x} is not one of a PyTorch checkpoint; refused"
                ));
            }
        }
        Ok(())
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or("a truncated pickle")?;
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    /// Reads a number of four bytes.
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

    /// Reads text up to the end of the line.
    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.rest.iter().position(|&b| b == b'\n');
        let line = self.take(end.ok_or("a truncated pickle")?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| "a name that is not text".into())
    }

    /// Pops the top of the stack above the last mark.
    fn pop(&mut self) -> Result<Value<'a>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.pop() {
            Some(value) if self.stack.len() >= floor => Ok(value),
            _ => Err("a pickle that pops from an empty stack".into()),
        }
    }

    /// Pops all values above the last mark.
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
            _ => Err("it appends to an object that is not a list".into()),
        }
    }

    /// Adds alternating keys and values to the dict on top of the stack.
    fn set(&mut self, items: Vec<Value<'a>>) -> Result<(), String> {
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err("a key without a value".into());
        };
        let dict = match self.stack.last() {
            Some(&Value::Dict(at)) => self.dicts.get_mut(at),
            _ => None,
        };
        let dict = dict.ok_or("it sets items of an object that is not a dict")?;
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
            .push(*value.ok_or("it refers to an undefined object")?);
        Ok(())
    }

    /// Returns the items of a tuple.
    fn items(&self, value: Value<'a>) -> Result<&[Value<'a>], String> {
        match value {
            Value::Tuple(at) => Ok(self.tuples.get(at).map_or(&[], Vec::as_slice)),
            _ => Err("an object that is not a tuple where one is required".into()),
        }
    }

    /// Makes a storage of `("storage", type, key, location, elements)`.
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
            return Err("a persistent id that is not a storage".into());
        };
        let stored = u64::try_from(stored).map_err(|_| "a storage of negative size")?;
        if key.len() > MAX_NAME {
            return Err("a storage with too long a name".into());
        }
        self.stack.push(Value::Storage(self.storages.len()));
        self.storages.push((element, key, stored));
        Ok(())
    }

    /// Evaluates a call of a supported function.
    fn reduce(&mut self) -> Result<(), String> {
        let (args, function) = (self.pop()?, self.pop()?);
        let Value::Global(function) = function else {
            return Err("it calls an object that is not a function; refused".into());
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

    /// Returns the numbers of a tuple, each at least 0.
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
        numbers.ok_or_else(|| "a shape or stride that is not a number of at least 0".into())
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
                "a tensor of shape {shape:?}, strides {strides:?}, offset {offset} does not fit in \
                 its storage of {stored} elements"
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
        // Index after the last element.
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

    /// Returns the tensors of the state dict in `root`.
    fn weights(self, root: Value<'a>) -> Result<BTreeMap<String, View>, String> {
        let dict = |value: Value| match value {
            Value::Dict(at) => self.dicts.get(at),
            _ => None,
        };
        let root = dict(root).ok_or("it has no state dict")?;
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
                "no weights at the top or under {}; its keys: {}",
                STATE_DICTS.join(", "),
                keys.join(", ")
            ));
        }
        Ok(weights)
    }
}

/// Returns the number of elements of a tensor, or `None` on overflow.
pub(super) fn product(shape: &[usize]) -> Option<u64> {
    // Other dimensions may overflow although one is 0.
    let sized = shape
        .iter()
        .try_fold(1u64, |n, &d| n.checked_mul(d.max(1) as u64))?;
    Some(if shape.contains(&0) { 0 } else { sized })
}
