import itertools
import json
import subprocess
import sys
import threading

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch

from sidetune.backbones import blocks, build_backbone, weightfile
from sidetune.backbones.blocks import AheadReader
from sidetune.backbones.random_weights import write_random_weights
from sidetune.backbones.streamed import StreamedBackbone
from sidetune.backbones.timm import TimmBackbone
from sidetune.backbones.weightfile import Stored
from sidetune.errors import BackboneError
from tiny_vits import hub_folder

# Plain blocks; registers; rotary positions; relative positions shared by no block; a norm before the blocks;
# sub-norms; residual post-norm, as the model of 4.4 billion has it.
FAMILIES = {
    "vit_small_patch14_dinov2": {"img_size": 28},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28},
    "vit_small_patch16_dinov3": {},
    "eva02_base_patch14_448": {"img_size": 28},
    "eva02_enormous_patch14_clip_224": {"img_size": 28, "mlp_ratio": 4},
    "beit_base_patch16_224": {},
    "vit_base_patch16_clip_224": {},
}
PLAIN = "vit_small_patch14_dinov2"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {name: hub_folder(root / name, name, **extra) for name, extra in FAMILIES.items()}


def images(backbone, count):
    size = backbone.preprocess.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_equals_in_memory_bit_for_bit(folders, name, precision):
    eager = TimmBackbone(name, weights=folders[name], precision=precision)
    streamed = StreamedBackbone(name, weights=folders[name], precision=precision, micro_batch=4)
    assert streamed.identity == eager.identity
    assert streamed.spec == eager.spec
    assert streamed.variant.runtime == "streamed"
    given = images(eager, 10)
    parts = [eager(given[first : first + 4]) for first in range(0, 10, 4)]
    for _ in range(2):  # the second call begins with the first block again
        found = streamed(given)
        for position, layer in enumerate(found.layers):
            assert torch.equal(layer, torch.cat([part.layers[position] for part in parts]))


def test_as_many_images_go_through_a_block_as_its_widest_layer_has_room_for(folders, monkeypatch):
    eager, streamed = (
        build_backbone(f"timm:{PLAIN}", weights=folders[PLAIN], runtime=how) for how in ("eager", "streamed")
    )
    seen, given = [], images(eager, 8)
    streamed.module.blocks[1]._stream.template.register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    widest = 4 * eager.spec.last.width * torch.float32.itemsize * eager.spec.last.num_tokens
    monkeypatch.setattr(blocks, "PART_BYTES", 3 * widest + 1)
    found = streamed(given).layers[-1]
    assert set(seen) == {3, 2}
    assert torch.equal(
        found, torch.cat([eager(given[some]).layers[-1] for some in (slice(3), slice(3, 6), slice(6, 8))])
    )


def test_fewer_taps_and_another_type(folders):
    streamed = StreamedBackbone(PLAIN, weights=folders[PLAIN])
    whole = streamed(images(streamed, 2))
    first = streamed.reading(["block.1"]).giving(torch.float16)
    for _ in range(2):  # it stops after block 1, and the next call begins where it does
        assert torch.equal(first(images(streamed, 2))["block.1"], whole["block.1"].half())
    assert torch.equal(streamed(images(streamed, 2)).layers[-1], whole.layers[-1])


def test_another_size_resamples_the_table_alone(folders):
    eager = TimmBackbone(PLAIN, weights=folders[PLAIN], size=56)
    streamed = build_backbone(f"timm:{PLAIN}", weights=folders[PLAIN], size=56, runtime="streamed")
    assert streamed.identity == eager.identity
    given = images(eager, 3)
    assert torch.equal(streamed(given).layers[-1], eager(given).layers[-1])


def test_blocks_whose_shapes_go_with_the_size_are_refused_at_another(folders):
    name = "beit_base_patch16_224"
    with pytest.raises(
        BackboneError, match=r"blocks\.0\.attn\.relative_position_bias_table has shape .*expected"
    ):
        StreamedBackbone(name, weights=folders[name], size=64)


def test_several_files_with_an_index(folders, tmp_path):
    tensors = safetensors.torch.load_file(folders[PLAIN] / "model.safetensors")
    names = sorted(tensors)
    files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in files.items():
        safetensors.torch.save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((folders[PLAIN] / "config.json").read_text())
    found = StreamedBackbone(PLAIN, weights=tmp_path)
    whole = StreamedBackbone(PLAIN, weights=folders[PLAIN])
    assert found.identity == whole.identity
    assert torch.equal(found(images(found, 2)).layers[-1], whole(images(whole, 2)).layers[-1])


def changed(folder, tmp_path, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("blocks.1.norm1.weight"),
            r"lack blocks\.1\.norm1\.weight, expected \(32,\)",
        ),
        (
            lambda t: t.update({"blocks.2.more": torch.ones(1)}),
            r"blocks\.2\.more has shape \(1,\), expected None",
        ),
        (lambda t: t.update({"blocks.4.more": torch.ones(1)}), r"lack blocks\.3\."),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.2.")],
            "have 2 blocks, expected 3 of vit_small",
        ),
        (lambda t: t.pop("cls_token"), r"1 weights are missing \(cls_token\)"),
        (lambda t: t.update(surplus=torch.ones(1)), r"1 are unexpected \(surplus\)"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks")], "weights are missing"),
    ],
)
def test_weights_that_do_not_fit(folders, tmp_path, change, message):
    with pytest.raises(BackboneError, match=message):
        StreamedBackbone(PLAIN, weights=changed(folders[PLAIN], tmp_path, change))


def test_a_whole_file_counts_before_pieces_as_everywhere(folders, tmp_path):
    """A model may have been saved again into the folder of an older one in pieces."""
    folder = changed(folders[PLAIN], tmp_path, lambda _: None)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"cls_token": "none.safetensors"}}')
    assert (
        StreamedBackbone(PLAIN, weights=folder).identity
        == StreamedBackbone(PLAIN, weights=folders[PLAIN]).identity
    )


def test_what_cannot_be_streamed_says_so(folders, tmp_path):
    with pytest.raises(BackboneError, match=r"expected a \.safetensors file or a folder"):
        build_backbone(f"timm:{PLAIN}", weights="random", runtime="streamed")
    with pytest.raises(BackboneError, match=r"config\.json says vit_small_patch14_dinov2, got deit_tiny"):
        StreamedBackbone("deit_tiny_patch16_224", weights=folders[PLAIN])
    with pytest.raises(BackboneError, match=r"no tap named 'attention\.1'"):
        StreamedBackbone(PLAIN, weights=folders[PLAIN], taps=["attention.1"])
    with pytest.raises(BackboneError, match=r"is streamed: its blocks are not in memory.*runtime=eager"):
        StreamedBackbone(PLAIN, weights=folders[PLAIN]).stages()
    with pytest.raises(BackboneError, match="takes no 'runtime'"):
        build_backbone("toy", runtime="streamed")


def test_the_hub_without_a_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=r"cannot be had from the hub: .*Type: --weights PATH"):
        build_backbone(f"timm:{PLAIN}", runtime="streamed")


def test_a_file_that_is_cut_meanwhile_is_an_error_of_the_call(folders, tmp_path):
    folder = changed(folders[PLAIN], tmp_path, lambda _: None)
    streamed = StreamedBackbone(PLAIN, weights=folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 4])
    with pytest.raises(BackboneError, match="end in the middle of a tensor"):
        streamed(images(streamed, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_read_as_it_is_or_piece_by_piece_into_another_type(tmp_path, monkeypatch, dtype):
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(()), "c": torch.randn(4)}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr(weightfile, "PIECE", 4)
    for name, stored in weightfile.stored_tensors(tmp_path).items():
        into = torch.empty(stored.shape, dtype=dtype)
        stored.read_into(into)
        assert torch.equal(into, tensors[name].to(dtype)), name


def test_the_system_is_told_of_the_next_block_beside_the_arithmetic(folders, monkeypatch):
    streamed = StreamedBackbone(PLAIN, weights=folders[PLAIN])
    reader, told = streamed._stream._reader, []
    numbers = {
        stored.start: number for number, block in enumerate(reader.blocks) for stored in block.values()
    }
    expect = Stored.expect

    def noted(stored):
        told.append((numbers[stored.start], threading.current_thread() is threading.main_thread()))
        expect(stored)

    monkeypatch.setattr(Stored, "expect", noted)
    streamed(images(streamed, 2))
    reader._expecting.shutdown()
    assert [number for number, _ in told] == [number for number in (1, 2, 0) for _ in reader.blocks[number]]
    assert not any(main for _, main in told)


def test_where_a_block_is_read_ahead_it_is_never_the_one_in_use(folders):
    """As for a GPU: while a block computes, another thread reads the next one, and no other."""
    streamed = StreamedBackbone(PLAIN, weights=folders[PLAIN])
    expected = streamed(images(streamed, 2)).layers[-1]
    cached = streamed._stream._reader
    reader = streamed._stream._reader = AheadReader(cached.blocks, cached.types, cached.device)
    read, seen = reader._read, []

    def noted(number, slot, done):
        seen.append((number, slot, threading.current_thread() is threading.main_thread()))
        read(number, slot, done)

    reader._read = noted
    assert torch.equal(streamed(images(streamed, 2)).layers[-1], expected)
    reader._ahead[1].result()
    assert [number for number, _, _ in seen] == [0, 1, 2, 0]
    assert all(one != other for (_, one, _), (_, other, _) in itertools.pairwise(seen))
    assert not any(main for *_, main in seen)


PEAK = """
import sys, torch
from pathlib import Path
from sidetune.backbones.streamed import StreamedBackbone
from sidetune.memory import PeakMemory, anonymous_bytes
backbone = StreamedBackbone("vit_base_patch16_224", weights=Path(sys.argv[1]), size=32, taps=["block.12"])
backbone(torch.zeros(1, 3, 32, 32))
before = anonymous_bytes()
with PeakMemory(interval=0.001) as memory:
    backbone(torch.zeros(1, 3, 32, 32))
print(anonymous_bytes(), memory.peak - before)
"""


def test_memory_holds_one_block_not_twelve(tmp_path):
    """ViT-B in float32 is 340 MB, a block 28: a process that has streamed it has grown by a few."""
    count = write_random_weights("vit_base_patch16_224", tmp_path / "b.safetensors", dtype=torch.float32)
    assert count == 85_798_656
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "b.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    held, grown = map(int, run.stdout.split())
    bare = subprocess.run(
        [sys.executable, "-c", PEAK.partition("backbone =")[0] + "print(anonymous_bytes())", ""],
        capture_output=True,
        text=True,
        check=True,
    )
    block = 28_351_488
    assert grown < block
    assert held - int(bare.stdout) < 1.8 * block


def test_random_weights_follow_their_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_random_weights("test_vit", tmp_path / f"{name}.safetensors", seed=seed)
    found = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"]
    assert found[0] == found[1] != found[2]
    streamed = StreamedBackbone("test_vit", weights=tmp_path / "a.safetensors")
    eager = TimmBackbone("test_vit", weights=tmp_path / "a.safetensors")
    assert streamed.identity == eager.identity
