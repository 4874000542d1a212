"""What videos of held-out people show, as numbers by name; see `metrics` for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lavatar_jax.data.talking_clips import Clip
from lavatar_jax.evaluation import metrics
from lavatar_jax.evaluation.probe import FaceProbe, Reading
from lavatar_jax.models.vae import CausalVAE

Floats = NDArray[np.float32]
Numbers = dict[str, float]


def probe_numbers(clips: Sequence[Clip], probes: Sequence[FaceProbe]) -> Numbers:
    """How well the probe reads the true pictures: what it says of others is worth that much."""
    seen = [probe.measure(clip.video) for clip, probe in zip(clips, probes, strict=True)]
    true = [clip.motion for clip in clips]
    blinks = [sum(metrics.count_blinks(track.blink) for track in tracks) for tracks in (seen, true)]
    return {
        "probe_openness": _mean(
            metrics.correlation(s.mouth_open, t.mouth_open) for s, t in zip(seen, true, strict=True)
        ),
        "probe_openness_variance": _mean(float(np.var(s.mouth_open)) for s in seen)
        / _mean(float(np.var(np.asarray(t.mouth_open))) for t in true),
        "probe_head_motion": _mean(map(metrics.head_deviation, seen))
        / _mean(map(metrics.head_deviation, true)),
        "probe_blinks": blinks[0] / max(blinks[1], 1),
        **{f"probe_{name}": share for name, share in _as_asked(seen, clips).items()},
    }


def _as_asked(readings: Sequence[Reading], clips: Sequence[Clip]) -> Numbers:
    """Shares of the videos that show the expression and the motion of the head that were asked for."""
    pairs = [(metrics.recognise_manner(r), clip.manner) for r, clip in zip(readings, clips, strict=True)]
    return {
        "smile_as_asked": _mean(shown.smile == asked.smile for shown, asked in pairs),
        "head_as_asked": _mean(shown.head == asked.head for shown, asked in pairs),
    }


_reconstruct = jax.jit(lambda vae, video: jnp.clip(vae.decode(vae.encode(video)), -1, 1))


def vae_numbers(vae: CausalVAE, clips: Sequence[Clip], probes: Sequence[FaceProbe]) -> Numbers:
    """Encoded and decoded again: PSNR in dB, of all and around the mouth, and what is left of the speech."""
    psnr, mouth, openness = [], [], []
    for clip, probe in zip(clips, probes, strict=True):
        video = np.asarray(_reconstruct(vae, jnp.asarray(clip.video)[None]))[0]
        box = np.asarray(metrics.mouth_box(clip.identity, clip.motion, video.shape[1]))
        psnr.append(metrics.psnr(video, clip.video))
        mouth.append(metrics.psnr(video, clip.video, box))
        openness.append(metrics.correlation(probe.measure(video).mouth_open, clip.motion.mouth_open))
    return {"vae_psnr": _mean(psnr), "vae_mouth_psnr": _mean(mouth), "vae_openness": _mean(openness)}


def speech_numbers(videos: Sequence[Floats], clips: Sequence[Clip], probes: Sequence[FaceProbe]) -> Numbers:
    """Lip-sync and liveliness of generated videos, each against its own clip.

    Lip-sync is told by the true openness; amounts (variance, motion, blinks) by what the same probe reads in
    the true video, so that its own errors cancel. Videos may be shorter than the clips. Video frame j belongs
    to frame j + 1 of the clip.
    """
    readings = [probe.measure(video) for probe, video in zip(probes, videos, strict=True)]
    lengths = [len(video) for video in videos]
    opening, lids = [reading.mouth_open for reading in readings], [reading.blink for reading in readings]
    seen = [
        probe.measure(clip.video[1 : n + 1]) for probe, clip, n in zip(probes, clips, lengths, strict=True)
    ]
    truth = [np.asarray(clip.motion.mouth_open)[1 : n + 1] for clip, n in zip(clips, lengths, strict=True)]
    correlations = [metrics.correlation(m, t) for m, t in zip(opening, truth, strict=True)]
    minutes = sum(lengths) / metrics.FRAMES_PER_SECOND / 60
    return {
        "openness": _mean(correlations),
        "openness_worst": min(correlations),
        "lag": metrics.peak_lag(opening, truth),
        "shuffled": metrics.shuffled_correlation(opening, truth),
        "openness_variance": _mean(map(np.var, opening))
        / _mean(float(np.var(reading.mouth_open)) for reading in seen),
        "sharpness": _mean(
            metrics.sharpness(video) / metrics.sharpness(clip.video[1 : len(video) + 1])
            for video, clip in zip(videos, clips, strict=True)
        ),
        "head_motion": _mean(map(metrics.head_deviation, readings))
        / _mean(map(metrics.head_deviation, seen)),
        "blinks": sum(map(metrics.count_blinks, lids)) / minutes,
        "partial_blinks": sum(metrics.count_blinks(track, 0.3, 0.15) for track in lids) / minutes,
        "true_blinks": sum(metrics.count_blinks(reading.blink) for reading in seen) / minutes,
        **_as_asked(readings, clips),
    }


def colour_numbers(videos: Sequence[Floats], clips: Sequence[Clip]) -> Numbers:
    """Colour error of each region, their mean, the worst, and the error against somebody else's colours.

    The error of a region that none of the videos shows (hair, of the bald) is nan, and counts for neither.
    """
    errors = [metrics.colour_error(video, clip.identity) for video, clip in zip(videos, clips, strict=True)]
    regions = {
        f"colour_{name}": _mean(error[name].mean() for error in errors if name in error)
        for name in metrics.COLOUR_REGIONS
    }
    seen = [error for error in regions.values() if not np.isnan(error)]
    wrong = [identity_error(video, clips[index - 1]) for index, video in enumerate(videos)]
    return {
        "colour": _mean(seen),
        "colour_worst": max(seen),
        **regions,
        "colour_wrong_person": _mean(wrong),
        "flicker": _mean(metrics.flicker(v, c.identity) for v, c in zip(videos, clips, strict=True)),
    }


def over_seeds(runs: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """Means of the same numbers of several runs, and their standard deviations; those only of two or more."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    spread = {name: float(np.std(found)) for name, found in values.items()} if len(runs) > 1 else {}
    return {name: _mean(found) for name, found in values.items()}, spread


def identity_error(video: Floats, clip: Clip) -> float:
    """Mean colour error of a video's regions, in levels of 255."""
    errors = metrics.colour_error(video, clip.identity)
    return _mean(error.mean() for error in errors.values())


def _mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return float(np.mean(found)) if found else float("nan")
