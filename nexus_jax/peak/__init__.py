"""The device peak of a training step without a compile."""

from nexus_jax.peak.prediction import Live as Live
from nexus_jax.peak.prediction import Prediction as Prediction
from nexus_jax.peak.prediction import predict as predict
