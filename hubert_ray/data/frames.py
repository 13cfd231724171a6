"""How many frames do N samples make, and which label belongs to which frame? Pure integers, no torch.

The conv encoder sees 400 samples (25 ms) per frame and moves by 320 (20 ms): frame t covers samples 320t .. 320t+399.
MFCC frames have the same 400-sample window and move by 160, so MFCC frame 2t covers exactly the samples of frame t.
Crops start on multiples of 320; then a crop's frame t *is* the utterance's frame start/320 + t, and its label is exact.
(fairseq's `data/audio/hubert_dataset.py` crops anywhere and rounds the label start, which shifts labels by up to half
a label frame.)
"""

from __future__ import annotations

import numpy as np

from hubert_ray.errors import HubertRayError

SAMPLE_RATE = 16_000
STRIDE = 320  # samples between two model frames: 20 ms
RECEPTIVE_FIELD = 400  # samples one model frame sees: 25 ms
MFCC_STRIDE = 160  # samples between two MFCC frames: 10 ms
LABEL_RATES_HZ = (50, 100)  # labels from model layers, labels from MFCC

CONV_KERNELS = (10, 3, 3, 3, 3, 2, 2)
CONV_STRIDES = (5, 2, 2, 2, 2, 2, 2)


class FrameError(HubertRayError):
    """A length, a crop or a label rate that does not fit the frame grid."""


def frames_of(samples: int) -> int:
    """Model frames (50 Hz) of `samples` samples; 0 if they are fewer than one receptive field."""
    return (samples - RECEPTIVE_FIELD) // STRIDE + 1 if samples >= RECEPTIVE_FIELD else 0


def samples_of(frames: int) -> int:
    """The fewest samples that make `frames` model frames."""
    if frames < 1:
        raise FrameError(f"samples_of: found {frames} frames, expected 1 or more")
    return STRIDE * (frames - 1) + RECEPTIVE_FIELD


def mfcc_frames_of(samples: int) -> int:
    """MFCC frames (100 Hz) of `samples` samples; between 2T-1 and 2T for T model frames."""
    return (samples - RECEPTIVE_FIELD) // MFCC_STRIDE + 1 if samples >= RECEPTIVE_FIELD else 0


def frames_at(samples_N: np.ndarray, rate_hz: int) -> np.ndarray:
    """How many frames a teacher of `rate_hz` (50 or 100) makes of each of some lengths; (N,) int64, 0 below one receptive field."""
    return np.maximum(0, (samples_N.astype(np.int64) - RECEPTIVE_FIELD) // (SAMPLE_RATE // rate_hz) + 1)


def labels_per_frame(label_rate_hz: int) -> int:
    """How many labels pass during one model frame: 1 at 50 Hz, 2 at 100 Hz."""
    if label_rate_hz not in LABEL_RATES_HZ:
        raise FrameError(f"label rate: found {label_rate_hz} Hz, expected one of {LABEL_RATES_HZ}")
    return label_rate_hz * STRIDE // SAMPLE_RATE


def label_index(frame: int, label_rate_hz: int) -> int:
    """The index of the label that covers exactly the samples of model frame `frame`."""
    if frame < 0:
        raise FrameError(f"label_index: found frame {frame}, expected 0 or more")
    return frame * labels_per_frame(label_rate_hz)


def crop_labels(start_sample: int, frames: int, label_rate_hz: int, available: int | None = None) -> slice:
    """The slice of an utterance's labels that belongs to a crop of `frames` frames at `start_sample`.

    `available` is the number of labels of the utterance; given, a slice past its end is an error and not a short result.
    """
    if start_sample < 0 or start_sample % STRIDE:
        raise FrameError(f"crop start: found sample {start_sample}, expected a multiple of {STRIDE}, 0 or more")
    if frames < 1:
        raise FrameError(f"crop length: found {frames} frames, expected 1 or more")
    step = labels_per_frame(label_rate_hz)
    first = label_index(start_sample // STRIDE, label_rate_hz)
    stop = first + (frames - 1) * step + 1
    if available is not None and stop > available:
        raise FrameError(
            f"crop at sample {start_sample} of {frames} frames needs {stop} labels at {label_rate_hz} Hz, found {available}: "
            "the labels were made for another audio or at another rate; make them again (stage assign_labels)"
        )
    return slice(first, stop, step)
