"""The loudness of speech. The small model's mouth follows it, so recordings are brought to one level."""

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

SPEECH_LEVEL_DB = -22.0  # of full scale; the training speech has this level


def speech_level_db(samples: Samples) -> float:
    """Loudness in dB of full scale of what is spoken: the 20 ms pieces within 25 dB of the loudest."""
    pieces = samples[: len(samples) // 320 * 320].reshape(-1, 320)
    power = np.mean(np.square(pieces, dtype=np.float64), axis=1)
    if not power.size or power.max() < 1e-8:
        return -80.0
    return float(10.0 * np.log10(power[power > power.max() * 10**-2.5].mean()))


def normalise_level(
    samples: Samples, level_db: float = SPEECH_LEVEL_DB, max_gain_db: float = 30.0
) -> Samples:
    """Scales a recording to the usual speech level; silence stays silence."""
    gain_db = level_db - speech_level_db(samples)
    if gain_db > max_gain_db:  # nothing but silence or faint noise
        return samples
    return np.clip(samples * 10.0 ** (gain_db / 20.0), -1.0, 1.0).astype(np.float32)
