"""The device peak of a training step without a compile."""

from nexus_jax.peak.predict import Live as Live
from nexus_jax.peak.predict import Prediction as Prediction
from nexus_jax.peak.predict import predict as predict
