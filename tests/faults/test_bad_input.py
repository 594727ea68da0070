"""Sources that can't be converted: each is refused with all of its problems at once, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.tiny import (
    Array,
    Tiny,
    bits,
    listing,
    read_distcp,
    read_safetensors,
    same,
    write_chunks,
    write_model,
    write_safetensors,
)

import shardway
from shardway.core.boxes import Box
from shardway.formats.torch_dist import open_torch_dist

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL = Tiny(layers=3)
INDEX = "model.safetensors.index.json"


def refused(root: Path, convert: Callable[[], object], *codes: str) -> shardway.ShardwayError:
    """Run a conversion that has to fail with problems of exactly these codes and change nothing below `root`."""
    before = listing(root)
    with pytest.raises(shardway.ShardwayError) as caught:
        convert()
    assert [problem.code for problem in caught.value.problems] == list(codes), str(caught.value)
    after = listing(root)
    assert after == before
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return caught.value


def import_refused(root: Path, *codes: str) -> shardway.ShardwayError:
    error = refused(root, lambda: shardway.import_hf(root / "hf", root / "out/deep"), *codes)
    assert not (root / "out").exists()
    return error


def says(error: shardway.ShardwayError, *words: str) -> None:
    for word in words:
        assert word in str(error), str(error)


def has_cures(error: shardway.ShardwayError) -> None:
    assert all(problem.cure for problem in error.problems), [p for p in error.problems if not p.cure]


class TestFiles:
    def test_a_missing_shard(self, tmp_path: Path) -> None:
        MODEL.write(tmp_path / "hf", num_files=3)
        (tmp_path / "hf/model-00002-of-00003.safetensors").unlink()
        error = import_refused(tmp_path, "file-missing")
        says(error, "model-00002-of-00003.safetensors", INDEX)
        has_cures(error)

    def test_two_missing_shards_and_a_broken_config(self, tmp_path: Path) -> None:
        MODEL.write(tmp_path / "hf", num_files=4)
        (tmp_path / "hf/model-00002-of-00004.safetensors").unlink()
        (tmp_path / "hf/model-00004-of-00004.safetensors").unlink()
        (tmp_path / "hf/config.json").write_text("{")
        error = import_refused(tmp_path, "config-invalid", "file-missing", "file-missing")
        says(error, "model-00002-of-00004", "model-00004-of-00004", "config.json")

    @pytest.mark.parametrize("cut", [1, 1000, 10**9])
    def test_a_truncated_file(self, cut: int, tmp_path: Path) -> None:
        file = MODEL.write(tmp_path / "hf", num_files=2) / "model-00001-of-00002.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: max(len(data) - cut, 4)])
        error = import_refused(tmp_path, "safetensors-truncated")
        says(error, "model-00001-of-00002.safetensors")
        has_cures(error)

    def test_a_header_that_lies_about_a_shape(self, tmp_path: Path) -> None:
        self.rewrite(tmp_path, lambda header: header["model.norm.weight"].update(shape=[9]))
        error = import_refused(tmp_path, "safetensors-header")
        says(error, "model.norm.weight", "model.safetensors")
        has_cures(error)

    def test_tensors_that_overlap(self, tmp_path: Path) -> None:
        def shift(header: dict[str, Any]) -> None:
            begin, end = header["model.norm.weight"]["data_offsets"]
            header["model.norm.weight"]["data_offsets"] = [begin - 2, end - 2]

        self.rewrite(tmp_path, shift)
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.import_hf(tmp_path / "hf", tmp_path / "out")
        assert "safetensors-overlap" in caught.value.codes
        says(caught.value, "model.norm.weight", "model.safetensors")

    def test_bytes_that_no_tensor_claims(self, tmp_path: Path) -> None:
        file = MODEL.write(tmp_path / "hf") / "model.safetensors"
        file.write_bytes(file.read_bytes() + b"\0\0")
        error = import_refused(tmp_path, "safetensors-gap")
        says(error, "model.safetensors")

    def rewrite(self, root: Path, change: Callable[[dict[str, Any]], None]) -> None:
        file = MODEL.write(root / "hf") / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])

    def test_an_index_that_disagrees(self, tmp_path: Path) -> None:
        MODEL.write(tmp_path / "hf", num_files=2)
        path = tmp_path / "hf" / INDEX
        index = json.loads(path.read_text())
        assert index["weight_map"]["model.norm.weight"] == "model-00001-of-00002.safetensors"
        index["weight_map"]["model.norm.weight"] = "model-00002-of-00002.safetensors"
        index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
        path.write_text(json.dumps(index))
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.import_hf(tmp_path / "hf", tmp_path / "out")
        assert caught.value.codes == {"index-mismatch"}
        says(caught.value, "model.norm.weight", "model.extra.weight", INDEX)
        has_cures(caught.value)

    def test_an_index_that_leaves_the_directory(self, tmp_path: Path) -> None:
        MODEL.write(tmp_path / "hf", num_files=2)
        (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../../etc/passwd"}}))
        says(import_refused(tmp_path, "path-escapes"), "../../etc/passwd")

    def test_no_config(self, tmp_path: Path) -> None:
        MODEL.write(tmp_path / "hf")
        (tmp_path / "hf/config.json").unlink()
        error = import_refused(tmp_path, "config-missing")
        says(error, "config.json")
        has_cures(error)

    def test_pickled_weights_only(self, tmp_path: Path) -> None:
        MODEL.write(tmp_path / "hf")
        (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/pytorch_model.bin")
        error = import_refused(tmp_path, "weights-not-safetensors")
        says(error, "pytorch_model.bin", "safe_serialization")

    def test_no_such_directory(self, tmp_path: Path) -> None:
        error = import_refused(tmp_path, "not-a-checkpoint")
        says(error, "does not exist")

    def test_a_megatron_checkpoint_where_a_hugging_face_one_should_be(self, tmp_path: Path) -> None:
        MODEL.write(tmp_path / "model")
        shardway.import_hf(tmp_path / "model", tmp_path / "hf", fsync=False)
        says(import_refused(tmp_path, "not-a-checkpoint"), "other direction")


class TestTensors:
    def write(self, root: Path, change: Callable[[dict[str, Array]], object], **config: object) -> None:
        weights = MODEL.weights()
        change(weights)
        write_model(root / "hf", MODEL.config | config, weights)

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        self.write(tmp_path, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
        error = import_refused(tmp_path, "tensor-missing")
        assert error.problems[0].tensor == "model.layers.1.mlp.up_proj.weight"
        says(error, "[6, 8]")
        has_cures(error)

    def test_an_extra_tensor(self, tmp_path: Path) -> None:
        self.write(tmp_path, lambda weights: weights.update({"model.layers.1.mlp.up_proj.lora_A": np.zeros(3, "<u2")}))
        error = import_refused(tmp_path, "tensor-unexpected")
        assert error.problems[0].tensor == "model.layers.1.mlp.up_proj.lora_A"
        assert error.problems[0].file == "model.safetensors"
        has_cures(error)

    def test_a_name_that_would_play_tricks_on_a_terminal(self, tmp_path: Path) -> None:
        self.write(tmp_path, lambda weights: weights.update({"\x1b[2J\r": np.zeros(3, "<u2")}))
        assert "\x1b" not in str(import_refused(tmp_path, "tensor-unexpected"))

    def test_a_transposed_tensor(self, tmp_path: Path) -> None:
        name = "model.layers.2.mlp.down_proj.weight"
        self.write(tmp_path, lambda weights: weights.update({name: weights[name].T}))
        error = import_refused(tmp_path, "shape-mismatch")
        says(error, "expected [8, 6], got [6, 8]", "transposed", name, "model.safetensors")
        has_cures(error)

    def test_everything_at_once(self, tmp_path: Path) -> None:
        def change(weights: dict[str, Array]) -> None:
            del weights["model.norm.weight"], weights["model.layers.0.self_attn.q_proj.weight"]
            weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:10]
            weights["model.rotary"] = np.zeros(3, "<u2")

        self.write(tmp_path, change)
        import_refused(tmp_path, "shape-mismatch", "tensor-missing", "tensor-missing", "tensor-unexpected")

    def test_fewer_layers_than_the_weights_have(self, tmp_path: Path) -> None:
        self.write(tmp_path, lambda _: None, num_hidden_layers=2)
        error = import_refused(tmp_path, "config-invalid", *["tensor-unexpected"] * 9)
        says(error, "describes 2 layers, and the weights hold 3", "num_hidden_layers")
        has_cures(error)

    def test_more_layers_than_the_weights_have(self, tmp_path: Path) -> None:
        self.write(tmp_path, lambda _: None, num_hidden_layers=4)
        error = import_refused(tmp_path, "config-invalid", *["tensor-missing"] * 9)
        says(error, "describes 4 layers, and the weights hold 3", "model.layers.3.mlp.up_proj.weight")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("hidden_size", 16),
            ("num_attention_heads", 8),
            ("num_key_value_heads", 4),
            ("head_dim", 8),
            ("intermediate_size", 7),
            ("vocab_size", 12),
        ],
    )
    def test_a_config_of_another_model(self, key: str, value: int, tmp_path: Path) -> None:
        self.write(tmp_path, lambda _: None, **{key: value})
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.import_hf(tmp_path / "hf", tmp_path / "out")
        assert caught.value.codes == {"shape-mismatch"}
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("hidden_size", None),
            ("hidden_size", "8"),
            ("hidden_size", 8.0),
            ("hidden_size", True),
            ("num_hidden_layers", 0),
            ("num_hidden_layers", -1),
            ("num_key_value_heads", 3),
            ("vocab_size", 10**30),
            ("tie_word_embeddings", "no"),
            ("attention_bias", 1),
            ("architectures", []),
            ("architectures", "LlamaForCausalLM"),
            ("rope_scaling", [1]),
        ],
    )
    def test_a_config_that_makes_no_sense(self, key: str, value: object, tmp_path: Path) -> None:
        self.write(tmp_path, lambda _: None, **{key: value})
        error = import_refused(tmp_path, "config-invalid")
        says(error, key, "config.json")

    def test_an_unsupported_architecture(self, tmp_path: Path) -> None:
        self.write(tmp_path, lambda _: None, architectures=["LLamaForCausalLM"])
        error = import_refused(tmp_path, "architecture-unsupported")
        says(error, "nearest supported: LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "config.json")

    def test_a_distinct_head_although_the_config_ties_it(self, tmp_path: Path) -> None:
        self.write(tmp_path, lambda _: None, tie_word_embeddings=True)
        error = import_refused(tmp_path, "tied-weights-differ")
        assert error.problems[0].tensor == "lm_head.weight"
        says(error, "tie_word_embeddings", "model.embed_tokens.weight", "elements differ")

    def test_a_head_that_differs_in_one_bit(self, tmp_path: Path) -> None:
        def change(weights: dict[str, Array]) -> None:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
            weights["lm_head.weight"][10, 7] ^= 1

        self.write(tmp_path, change, tie_word_embeddings=True)
        says(import_refused(tmp_path, "tied-weights-differ"), "1 elements differ, the first at [10, 7]")

    def test_a_head_of_another_shape(self, tmp_path: Path) -> None:
        self.write(
            tmp_path,
            lambda weights: weights.update({"lm_head.weight": np.zeros((12, 8), "<u2")}),
            tie_word_embeddings=True,
        )
        import_refused(tmp_path, "tied-weights-differ")

    def test_an_identical_head_is_accepted_and_restored(self, tmp_path: Path) -> None:
        weights = MODEL.weights()
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        write_model(tmp_path / "hf", MODEL.config | {"tie_word_embeddings": True}, weights, num_files=2)
        shardway.import_hf(tmp_path / "hf", tmp_path / "out", verify=True, fsync=False)
        assert "output_layer.weight" not in read_distcp(tmp_path / "out")
        shardway.export_hf(tmp_path / "out", tmp_path / "back", verify=True, fsync=False)
        assert same(bits(read_safetensors(tmp_path / "back").items()), weights)

    @pytest.mark.parametrize(("tag", "scale"), [("F8_E4M3", "weight_scale_inv"), ("I8", "weight_scale")])
    def test_quantised_weights(self, tag: str, scale: str, tmp_path: Path) -> None:
        entries = {name: ("BF16", array) for name, array in MODEL.weights().items()}
        quantised = [name for name in entries if "_proj" in name]
        for name in quantised:
            entries[name] = (tag, np.ones(entries[name][1].shape, np.uint8))
            entries[name.replace("weight", scale)] = ("F32", np.ones((1, 1), "<u4"))
        MODEL.write(tmp_path / "hf")
        write_safetensors(tmp_path / "hf/model.safetensors", entries)
        error = import_refused(
            tmp_path, *["tensor-unexpected"] * len(quantised), *["dtype-unsupported"] * len(quantised)
        )
        says(error, "without their scales", f"q_proj.{scale}", "bf16 version")
        has_cures(error)

    def test_parts_of_one_tensor_in_two_dtypes(self, tmp_path: Path) -> None:
        entries = {name: ("BF16", array) for name, array in MODEL.weights().items()}
        name = "model.layers.1.mlp.gate_proj.weight"
        entries[name] = ("F32", np.zeros((6, 8), "<u4"))
        entries["model.norm.weight"] = ("F32", np.zeros(8, "<u4"))  # alone in its tensor: no problem
        MODEL.write(tmp_path / "hf")
        write_safetensors(tmp_path / "hf/model.safetensors", entries)
        error = import_refused(tmp_path, "dtype-mixed")
        says(error, "linear_fc1.weight", name, "float32", "bfloat16", "--dtype")
        shardway.import_hf(tmp_path / "hf", tmp_path / "cast", dtype="bf16", fsync=False, verify=True)

    def test_buffers_that_the_config_determines_are_left_out_and_noted(self, tmp_path: Path) -> None:
        buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(2, "<u2") for i in range(3)}
        self.write(tmp_path, lambda weights: weights.update(buffers))
        report = shardway.import_hf(tmp_path / "hf", tmp_path / "out", fsync=False)
        assert any("3 buffers" in note for note in report.notes)


class TestMegatron:
    """Sources of an export."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        MODEL.write(tmp_path / "hf")
        shardway.import_hf(tmp_path / "hf", tmp_path / "m", max_file_size=9000, fsync=False)
        return tmp_path

    def refused(self, root: Path, *codes: str, **options: Any) -> shardway.ShardwayError:
        error = refused(root, lambda: shardway.export_hf(root / "m", root / "out/deep", **options), *codes)
        assert not (root / "out").exists()
        return error

    def test_a_missing_file(self, root: Path) -> None:
        (root / "m/iter_0000000/__0_1.distcp").unlink()
        error = self.refused(root, "file-missing")
        says(error, "__0_1.distcp", "keys have data in it")
        has_cures(error)

    def test_a_truncated_file(self, root: Path) -> None:
        file = root / "m/iter_0000000/__0_1.distcp"
        file.write_bytes(file.read_bytes()[:-1])
        says(self.refused(root, "distcp-truncated"), "__0_1.distcp")

    def test_no_metadata(self, root: Path) -> None:
        (root / "m/iter_0000000/.metadata").unlink()
        error = self.refused(root, "metadata-missing")
        says(error, ".metadata", "not finished")

    def test_a_pickle_that_would_run_code(self, root: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return (open, (str(root / "pwned"), "w"))

        (root / "m/iter_0000000/.metadata").write_bytes(pickle.dumps(Evil()))
        error = self.refused(root, "pickle-forbidden")
        says(error, "open", ".metadata")
        assert not (root / "pwned").exists()

    def test_a_flipped_bit(self, root: Path) -> None:
        checkpoint = open_torch_dist(root / "m")
        tensor = checkpoint.catalog.tensors["decoder.layers.mlp.linear_fc2.weight"]
        chunk = tensor.chunks[1]
        file = checkpoint.root / chunk.file
        data = bytearray(file.read_bytes())
        data[chunk.offset + 17] ^= 4
        file.write_bytes(data)
        error = self.refused(root, "digest-mismatch")
        says(error, "decoder.layers.mlp.linear_fc2.weight", chunk.file, "xxh3-128", f"from {list(chunk.start)}")
        report = shardway.verify(root / "hf", root / "m")
        assert {difference.kind for difference in report.differences} == {"values", "damaged"}

    def test_a_record_that_is_damaged(self, root: Path) -> None:
        (root / "m/iter_0000000/shardway.json").write_text('{"format": 1}')
        says(self.refused(root, "record-invalid"), "shardway.json")

    def test_a_key_that_no_rule_knows(self, root: Path) -> None:
        folder, tensors = self.rewritten(root)
        tensors["decoder.layers.mlp.adapter.weight"] = np.zeros((3, 4), np.uint16)
        self.write(folder, tensors)
        error = self.refused(root, "tensor-unexpected", hf=root / "hf")
        says(error, "decoder.layers.mlp.adapter.weight", "__0_0.distcp")
        has_cures(error)

    def test_a_missing_key_and_a_wrong_shape(self, root: Path) -> None:
        folder, tensors = self.rewritten(root)
        del tensors["output_layer.weight"]
        tensors["embedding.word_embeddings.weight"] = np.zeros((11, 9), np.uint16)
        self.write(folder, tensors)
        error = self.refused(root, "shape-mismatch", "tensor-missing", hf=root / "hf")
        says(error, "output_layer.weight", "expected [11, 8], got [11, 9]")

    def test_other_layers_than_the_config(self, root: Path) -> None:
        config = MODEL.config | {"num_hidden_layers": 2}
        write_model(root / "other", config, {})
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.export_hf(root / "m", root / "out", hf=root / "other")
        assert caught.value.codes == {"shape-mismatch"}
        shardway.import_hf(root / "hf", root / "p", layout="per-layer", fsync=False)
        with pytest.raises(shardway.ShardwayError) as caught:
            shardway.export_hf(root / "p", root / "out", hf=root / "other")
        assert caught.value.codes == {"config-invalid", "tensor-unexpected"}
        assert not (root / "out").exists()

    def test_a_hole(self, root: Path) -> None:
        folder, tensors = self.rewritten(root)
        self.write(folder, tensors, hole="decoder.layers.mlp.linear_fc1.weight")
        error = self.refused(root, "chunk-hole", hf=root / "hf")
        says(error, "decoder.layers.mlp.linear_fc1.weight", "[1, 0, 0]", "[3, 12, 8]")
        has_cures(error)

    def test_an_overlap(self, root: Path) -> None:
        folder, tensors = self.rewritten(root)
        self.write(folder, tensors, overlap="decoder.layers.mlp.linear_fc1.weight")
        error = self.refused(root, "chunk-overlap", hf=root / "hf")
        says(error, "decoder.layers.mlp.linear_fc1.weight", "[1, 0, 0]", "covered by 2 chunks")

    def test_a_hole_and_an_overlap_are_told_together(self, root: Path) -> None:
        folder, tensors = self.rewritten(root)
        self.write(
            folder, tensors, hole="decoder.layers.mlp.linear_fc1.weight", overlap="decoder.layers.mlp.linear_fc2.weight"
        )
        error = refused(
            root, lambda: shardway.export_hf(root / "m", root / "out", hf=root / "hf"), *["chunk-hole", "chunk-overlap"]
        )
        assert len({problem.tensor for problem in error.problems}) == 2

    def test_an_empty_iteration_that_is_newer(self, root: Path) -> None:
        (root / "m/iter_0000005").mkdir()
        report = shardway.export_hf(root / "m", root / "back", fsync=False)
        assert report.iteration == "iter_0000000"
        (root / "m/latest_checkpointed_iteration.txt").write_text("5")
        says(self.refused(root, "metadata-missing"), "iter_0000005")
        (root / "m/latest_checkpointed_iteration.txt").write_text("7")
        says(self.refused(root, "tracker-invalid"), "iter_0000007", "iter_0000000")
        (root / "m/latest_checkpointed_iteration.txt").write_text("abc")
        says(self.refused(root, "tracker-invalid"), "abc")
        (root / "m/latest_checkpointed_iteration.txt").unlink()
        says(self.refused(root, "tracker-invalid"), "iter_0000000")
        assert shardway.export_hf(root / "m/iter_0000000", root / "again", fsync=False).iteration == "iter_0000000"

    def test_training_state_is_left_out_and_noted(self, tmp_path: Path) -> None:
        """As Megatron-LM saves it: optimizer state, RNG states and more beside the model, by torch's own writer."""
        torch = pytest.importorskip("torch")
        from tests.oracle import write_torch_dist

        weights = MODEL.weights()
        tensors = {name: torch.from_numpy(a.copy()).view(torch.bfloat16) for name, a in MODEL.megatron(weights).items()}
        state = {
            f"optimizer.state.{kind}.{name}": torch.zeros(tensor.shape, dtype=torch.float32)
            for kind in ("exp_avg", "exp_avg_sq", "fp32_param")
            for name, tensor in tensors.items()
        }
        objects = {
            "rng_state/shard_0_1": [{"random_rng_state": (3, (1, 2), None)}],
            "rerun_state_machine_state/shard_0_1": {"mode": "disabled"},
            "optimizer.param_groups": [{"lr": 1e-4}],
            "chained_0.optimizer.state.step/shard_0_1": 4,
        }
        folder = tmp_path / "m/iter_0000010"
        write_torch_dist(folder, tensors | state | objects, num_layers=3, per_layer=False)
        (tmp_path / "m/latest_checkpointed_iteration.txt").write_text("10")
        MODEL.write(tmp_path / "hf")
        report = shardway.export_hf(tmp_path / "m", tmp_path / "out", hf=tmp_path / "hf", verify=True, fsync=False)
        assert same(bits(read_safetensors(tmp_path / "out").items()), weights)
        assert [
            note for note in report.notes if note.startswith(f"{len(state) + len(objects)} entries of training state")
        ]
        assert report.iteration == "iter_0000010"

    def rewritten(self, root: Path) -> tuple[Path, dict[str, Array]]:
        """Where the checkpoint is, and its tensors, to be written anew by torch."""
        pytest.importorskip("torch")
        folder = root / "m/iter_0000000"
        tensors = read_distcp(root / "m")
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        folder.rmdir()
        return folder, tensors

    def write(self, folder: Path, tensors: dict[str, Array], hole: str = "", overlap: str = "") -> None:
        chunked: dict[str, list[tuple[Box, Array]]] = {}
        for name, array in tensors.items():
            if name not in {hole, overlap}:
                chunked[name] = [(Box((0,) * array.ndim, array.shape), array)]
                continue
            rows = [(0, 1), (2, 1)] if name == hole else [(0, 2), (1, 2)]
            chunked[name] = [
                (Box((low, *(0,) * (array.ndim - 1)), (size, *array.shape[1:])), array[low : low + size])
                for low, size in rows
            ]
        write_chunks(folder, {name: array.shape for name, array in tensors.items()}, chunked)
