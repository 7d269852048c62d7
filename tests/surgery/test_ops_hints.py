import types

import numpy
import torch
from torch import nn

from modsurg import edit, replace, resize


def gpt():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 3), "lm_head": nn.Linear(3, 5, bias=False)})
    model["lm_head"].weight = model["wte"].weight
    return model


def run(notes, model):
    """Execute the line of each note."""
    import modsurg

    for note in notes:
        exec(note.partition(": ")[2], {"model": model, "torch": torch, "modsurg": modsurg})


def test_a_config_that_says_otherwise_is_pointed_out():
    model = gpt()
    model.config = types.SimpleNamespace(vocab_size=5)
    report = resize(model, "lm_head", out_features=8)
    assert report.notes == ("the model may go by its vocab_size, which still says 5: model.config.vocab_size = 8",)
    assert resize(model, "wte", num_embeddings=9).notes == ()


def test_numbers_of_labels_and_channels_that_say_otherwise_are_pointed_out():
    model = nn.ModuleDict({"patches": nn.ModuleDict({"projection": nn.Conv2d(3, 4, 2)}), "head": nn.Linear(4, 2)})
    model.config = types.SimpleNamespace(num_labels=2, num_channels=3)
    model["patches"].num_channels = 3
    assert resize(model, "head", out_features=4).notes == ()
    resize(model, "head", out_features=2)
    model.num_labels = 2
    note = "the model may go by its num_labels, which still says 2: model.config.num_labels = model.num_labels = 4"
    assert resize(model, "head", out_features=4).notes == (note,)
    notes = resize(model, "patches.projection", in_channels=1).notes
    assert any('model.config.num_channels = model.get_submodule("patches").num_channels = 1' in note for note in notes)


def test_what_has_such_a_name_and_is_no_number_says_nothing():
    model = nn.ModuleDict({"head": nn.Linear(4, 2)})
    model.num_classes = torch.tensor([2, 2])
    model.config = types.SimpleNamespace(vocab_size=numpy.int64(2))
    note = "the model may go by its vocab_size, which still says 2: model.config.vocab_size = 4"
    assert resize(model, "head", out_features=4).notes == (note,)


def test_a_property_that_raises_is_not_asked_for_a_size():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        @property
        def num_classes(self):
            raise RuntimeError("no trainer is attached")

        config = num_labels = num_classes

    assert resize(Task(), "head", out_features=4).notes == ()


def test_a_wrapper_that_passes_on_what_it_has_not_is_not_named():
    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "base" else getattr(self.base, name)

    base = nn.ModuleDict({"head": nn.Linear(4, 2)})
    base.num_classes = 2
    report = resize(Wrapper(base), "base.head", out_features=4)
    assert report.notes == (
        'the model may go by its num_classes, which still says 2: model.get_submodule("base").num_classes = 4',
    )


def test_replace_says_what_resize_says():
    model = nn.ModuleDict({"fc": nn.Linear(4, 10), "stem": nn.Conv2d(3, 4, 2)})
    model.num_classes, model.in_chans = 10, 3
    with edit(model) as e:
        e.replace("fc", lambda old: nn.Sequential(nn.Dropout(), nn.Linear(4, 7)))
        e.replace("fc", lambda old: nn.Linear(4, 3))
        e.replace("stem", lambda old: nn.Conv2d(1, 4, 2))
    assert e.report.notes == (
        "the model may go by its num_classes, which still says 10: model.num_classes = 3",
        "the model may go by its in_chans, which still says 3: model.in_chans = 1",
    )
    run(e.report.notes, model)
    assert (model.num_classes, model.in_chans) == (3, 1)
    with edit(model) as e:
        e.resize("fc", out_features=5)
        e.resize("fc", out_features=3)
    assert e.report.notes == ()


def test_a_background_class_and_packed_anchors_are_seen():
    model = nn.ModuleDict({"box": nn.Linear(4, 6), "cls": nn.Conv2d(4, 45, 1), "other": nn.Conv2d(4, 46, 1)})
    model.num_classes = 5
    (note,) = resize(model, "box", out_features=8).notes
    assert note == "the model may go by its num_classes, which still says 5: model.num_classes = 7"
    note, warning = resize(model, "cls", out_channels=63).notes
    assert note == "the model may go by its num_classes, which still says 5 (9 for each of 5): model.num_classes = 7"
    assert warning == ("cls: its outputs are packed, 9 for each of 5 classes, and were kept by position, not by class")
    assert resize(model, "other", out_channels=63).notes == ()


class Config:
    def __init__(self, **entries):
        self.__dict__.update(entries)


def composite():
    """Two language models in one, as an encoder and a decoder have a configuration each."""
    model = nn.ModuleDict({side: nn.ModuleDict({"embed": nn.Embedding(50, 4)}) for side in ("encoder", "decoder")})
    model.config = Config(encoder=Config(vocab_size=50), decoder=Config(vocab_size=50))
    model["encoder"].config, model["decoder"].config = model.config.encoder, model.config.decoder
    model["head"] = nn.Linear(4, 50)
    return model


def test_of_several_configurations_the_nearest_is_named():
    model = composite()
    notes = resize(model, "decoder.embed", num_embeddings=53).notes
    assert notes == ("the model may go by its vocab_size, which still says 50: model.config.decoder.vocab_size = 53",)
    run(notes, model)
    assert (model.config.encoder.vocab_size, model.config.decoder.vocab_size) == (50, 53)
    (note,) = resize(model, "head", out_features=53).notes
    assert note.endswith("which still says 50: model.config.encoder.vocab_size = 53")


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.config = Config(max_position_embeddings=6)
        self.inner = Inner()


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("position_ids", torch.arange(6).expand(1, -1))
        self.register_buffer("token_type_ids", torch.zeros(1, 6, dtype=torch.long), persistent=False)
        self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).tril())
        self.register_buffer("final_logits_bias", torch.full((1, 6), 2.0))
        self.register_buffer("order", torch.tensor([3, 1, 2, 0, 5, 4]))


def test_buffers_of_the_old_size_are_named_with_the_line_that_makes_them_again():
    model = Tables()
    first, *lines, last = resize(model, "positions", num_embeddings=8).notes
    assert first.endswith("model.config.max_position_embeddings = 8")
    assert last == "still of the old size 6: inner.order; make them again for 8"
    run(lines, model)
    inner = model.inner
    assert torch.equal(inner.position_ids, torch.arange(8).expand(1, -1))
    assert torch.equal(inner.token_type_ids, torch.zeros(1, 8, dtype=torch.long))
    assert torch.equal(inner.mask, torch.ones(8, 8, dtype=torch.bool).tril())
    assert inner.final_logits_bias.tolist() == [[2.0] * 6 + [0.0] * 2]
    assert sorted(model.state_dict()) == sorted(Tables().state_dict())


def test_an_output_table_of_the_old_size_is_named_first():
    class Lm(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(5, 3), nn.Linear(3, 5)
            self.vocab_size = 5

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.lm_head

    model = Lm()
    notes = resize(model, "embed", num_embeddings=8).notes
    assert notes[0] == 'lm_head still has 5 outputs: modsurg.resize(model, "lm_head", out_features=8)'
    run(notes, model)
    assert (model.lm_head.out_features, model.vocab_size) == (8, 8)
    with edit(model) as e:
        e.resize("embed", num_embeddings=9)
        e.replace("lm_head", nn.Linear(3, 9))
    assert not any("lm_head" in note for note in e.report.notes)
    assert replace(Lm(), "lm_head", nn.Linear(3, 7)).notes[0].startswith("embed still has 5 rows: ")
