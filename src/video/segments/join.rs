//! Joining of segments to the output.

use std::{fs::File, path::Path, time::Duration};

use super::{
    Made, Segments,
    file::{SegmentReader, sync_folder},
};
use crate::{
    Error, Result,
    video::{
        End, Options, Reader, Transcoded, Writer,
        reader::losses,
        transcode::{Partial, conclude, with_path},
        verify::Expected,
        writer::Input,
    },
};

impl Segments {
    /// Tests that the audio, the subtitles and the other streams of `input` can be kept in the
    /// output, and reports changes. `size` is that of the output.
    ///
    /// # Errors
    /// As [`Writer::create`].
    pub fn check(&self, input: &Path, size: (usize, usize), options: &Options) -> Result<()> {
        let stream = self.plan.stream.with_size(size.0, size.1)?;
        let source = Some((input, &*self.plan.survey));
        Writer::prepare(&self.output, Input::Frames(&stream), options, source).map(drop)
    }

    /// Joins all segments to the output, with the audio, subtitles, tags and chapters of `input`,
    /// and checks it, as [`transcode`](crate::video::transcode) does. If `made` has ended with
    /// damage of the input, joins the frames before.
    ///
    /// # Errors
    /// [`Error::Video`] or [`Error::Io`] if a segment is missing or damaged, or writing fails. No
    /// file is left in that case.
    pub fn join(&self, input: &Reader, made: Made, options: &Options) -> Result<Transcoded> {
        // Changes have been reported before the work.
        let options = &Options {
            notice: None,
            ..options.clone()
        };
        let plan = &self.plan;
        let output = &*self.output;
        let source = Some((input.path(), &*plan.survey));
        let mut partial = Partial::new(output, input.path())?;
        let named = |e| with_path(e, output);
        let mut done = Transcoded {
            path: None,
            frames: 0,
            end: made.end,
            audio: Vec::new(),
            warnings: input.warnings().to_vec(),
        };
        let mut files: Vec<_> = (0..plan.len()).map(|index| self.path(index)).collect();
        if let Some((index, file)) = &made.rest {
            files.truncate(*index);
            files.push(file.path().to_owned());
        }
        let mut writer: Option<(Writer, gst::Caps)> = None;
        let mut expected = Expected::default();
        let (mut shown, mut decoded) = (Duration::ZERO, None);
        for path in &files {
            let wrong = |reason: String| Error::video(path, reason);
            let file = SegmentReader::open(path).and_then(|mut file| file.check().map(|()| file));
            let mut file = file.map_err(|e| wrong(e.to_string()))?;
            if file.content.frames == 0 {
                continue;
            }
            file.content.add_to(&mut expected);
            shown = shown.max(file.content.end);
            let caps: gst::Caps = file
                .content
                .caps
                .parse()
                .map_err(|_| wrong("its packets have an unknown format".into()))?;
            let (writer, first) = match &mut writer {
                Some(writer) => writer,
                none => {
                    partial.make(output)?;
                    let video = Input::Packets(&plan.stream, &caps);
                    let made = Writer::with_source(&partial.path, video, options, source);
                    none.insert((made.map_err(named)?, caps.clone()))
                }
            };
            if caps != *first {
                let reason = "its packets have another format than those of the first segment: \
                              make all segments with one version of the encoder";
                return Err(wrong(reason.into()));
            }
            for packet in file.packets(&caps, &mut decoded) {
                let packet = packet.map_err(|e| wrong(e.to_string()))?;
                let pushed = options.check_stop();
                match pushed.and_then(|()| writer.push_packet(&packet, shown)) {
                    Err(Error::Cancelled) => {
                        done.end = End::Stopped;
                        return Ok(done);
                    }
                    pushed => pushed.map_err(named)?,
                }
            }
        }
        if let Some((writer, _)) = writer {
            let frames = expected.frames;
            let end = shown + plan.survey.origin();
            let lost = || {
                plan.track
                    .iter()
                    .flat_map(|t| losses(t, frames, end))
                    .collect()
            };
            conclude(
                &mut done,
                writer,
                &partial.path,
                expected,
                &plan.survey,
                lost,
            )
            .map_err(named)?;
            // The segments may be removed only when the output is on the disk.
            let synced = File::open(&partial.path).and_then(|file| file.sync_all());
            synced.map_err(Error::io(output))?;
            let whole = matches!(done.end, End::Complete);
            done.path = Some(partial.keep(whole.then_some(output))?);
            sync_folder(output)?;
        }
        Ok(done)
    }
}
