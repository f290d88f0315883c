from __future__ import annotations

from experiments.detection_layers import candidate_layers, query_and_key, weight_of
from experiments.detection_models import SETUPS


def test_every_kind_finds_its_layers():
    for name, setup in SETUPS.items():
        model = setup.make_model()
        attention = candidate_layers(model, "attention")
        assert bool(attention) == (not name.startswith(("mlp", "cnn")))
        for layer in attention:
            assert len(query_and_key(model.get_submodule(layer))) == 2
        for layer in candidate_layers(model, "weight"):
            assert weight_of(model.get_submodule(layer)).dim() > 1
        relus = candidate_layers(model, "relu")
        assert bool(relus) == name.startswith(("mlp", "cnn", "encoder"))
        assert candidate_layers(model, None) == [None]
