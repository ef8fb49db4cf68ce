"""The device peak of a training step without a compile: what XLA fuses, writes, keeps and where it puts it, simulated.

Layers, each importing only what stands before it: ``graph`` (a jaxpr, flat), ``rules`` (what a compiler does),
``fuse`` (which values are written), ``order`` (when), ``heap`` and ``fast`` (where), ``live`` (for how long), ``prediction``.
"""

from nexus_jax.peak.prediction import Live as Live
from nexus_jax.peak.prediction import Prediction as Prediction
from nexus_jax.peak.prediction import predict as predict
from nexus_jax.peak.prediction import predict_peak as predict_peak
