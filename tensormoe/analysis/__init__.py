"""Analysis of experts: use, specialisation, interventions, probes, similarity.

Everything is fed by coefficients or routing records of any library, and by labels. Counts and sums
of batches add up with ``+``, so that a data set may come in parts; what follows from them is
computed on the host, and is the same for every library. NumPy must be installed.

>>> import numpy as np
>>> coefficients, labels = np.eye(3)[[0, 0, 1, 2]], [0, 0, 1, 0]
>>> parts = [
...     class_histogram(coefficients[part], labels[part], classes=2)
...     for part in (slice(0, 2), slice(2, 4))
... ]
>>> (parts[0] + parts[1]).mass.tolist()
[[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
"""

from __future__ import annotations

from tensormoe.analysis._effects import logit_attribution as logit_attribution
from tensormoe.analysis._effects import risk_difference as risk_difference
from tensormoe.analysis._explorer._collect import explore_coefficients as explore_coefficients
from tensormoe.analysis._explorer._examples import Images as Images
from tensormoe.analysis._explorer._examples import Table as Table
from tensormoe.analysis._explorer._examples import Texts as Texts
from tensormoe.analysis._explorer._examples import Tokens as Tokens
from tensormoe.analysis._explorer._explore import explore as explore
from tensormoe.analysis._explorer._neuronpedia import neuronpedia_batches as neuronpedia_batches
from tensormoe.analysis._explorer._top import TopInputs as TopInputs
from tensormoe.analysis._explorer._value import Exploration as Exploration
from tensormoe.analysis._explorer._value import ExploredLevel as ExploredLevel
from tensormoe.analysis._explorer._value import NearestExperts as NearestExperts
from tensormoe.analysis._explorer._value import RecordedInput as RecordedInput
from tensormoe.analysis._histograms import ClassHistogram as ClassHistogram
from tensormoe.analysis._histograms import Specialization as Specialization
from tensormoe.analysis._histograms import class_histogram as class_histogram
from tensormoe.analysis._histograms import specialization as specialization
from tensormoe.analysis._interventions import Interventions as Interventions
from tensormoe.analysis._interventions import interventions as interventions
from tensormoe.analysis._interventions import interventions_by_runs as interventions_by_runs
from tensormoe.analysis._patching import Metric as Metric
from tensormoe.analysis._patching import patching as patching
from tensormoe.analysis._polysemanticity import chance_polysemanticity as chance_polysemanticity
from tensormoe.analysis._polysemanticity import polysemanticity as polysemanticity
from tensormoe.analysis._probes import Probe as Probe
from tensormoe.analysis._probes import sparse_probe as sparse_probe
from tensormoe.analysis._similarity import expert_similarity as expert_similarity
from tensormoe.analysis._spectra import RankCurve as RankCurve
from tensormoe.analysis._spectra import rank_curve as rank_curve
from tensormoe.analysis._spectra import spectrum as spectrum
from tensormoe.analysis._spectra import truncated as truncated
from tensormoe.analysis._use import ExpertLoad as ExpertLoad
from tensormoe.analysis._use import activation_histogram as activation_histogram
from tensormoe.analysis._use import expert_load as expert_load

__all__ = [
    "ClassHistogram",
    "ExpertLoad",
    "Exploration",
    "ExploredLevel",
    "Images",
    "Interventions",
    "Metric",
    "NearestExperts",
    "Probe",
    "RankCurve",
    "RecordedInput",
    "Specialization",
    "Table",
    "Texts",
    "Tokens",
    "TopInputs",
    "activation_histogram",
    "chance_polysemanticity",
    "class_histogram",
    "expert_load",
    "expert_similarity",
    "explore",
    "explore_coefficients",
    "interventions",
    "interventions_by_runs",
    "logit_attribution",
    "neuronpedia_batches",
    "patching",
    "polysemanticity",
    "rank_curve",
    "risk_difference",
    "sparse_probe",
    "specialization",
    "spectrum",
    "truncated",
]
