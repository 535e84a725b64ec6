"""A version folder that may come from anywhere, checked before anything of it is run.

The manifest says whether its files are those that were sealed; it cannot say whether they were sealed by a friend. So
files must be plain and shared with nobody, and a graph may find its weights only in the sealed files beside it: ONNX
lets a graph name any path for them.

External data: https://github.com/onnx/onnx/blob/main/docs/ExternalData.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from exporters.errors import InvalidVersion
from triton_backend import version_folder
from triton_backend.errors import VersionFolderError


def check_version(folder: Path) -> dict[str, Any]:
    """Check every file of ``folder`` and return its manifest; raises InvalidVersion naming the first bad one."""
    if not folder.is_dir():
        raise InvalidVersion(f"{folder} is not a folder; expected a version folder, as an export writes it")
    _check_hard_links(folder)
    try:
        manifest = version_folder.verify(folder)
    except VersionFolderError as error:
        raise InvalidVersion(error.args[0]) from error
    for name in sorted(manifest["files"]):
        if name.endswith(".onnx"):
            _check_external_data(folder, name, manifest["files"])
    return manifest


def _check_hard_links(folder: Path) -> None:
    """A file with a second name can be changed through it, without a trace in this folder. (Checkpoints may have such
    files: download caches make them, and a checkpoint is read once and then only compared by its sha256.)
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and (num_links := path.stat().st_nlink) > 1:
            raise InvalidVersion(
                f"{path} has {num_links} hard links; expected files that exist under one name only, so that nobody "
                "changes them from elsewhere: copy the folder (cp -r) and verify the copy"
            )


def _check_external_data(folder: Path, name: str, files: Mapping[str, Any]) -> None:
    try:
        model = onnx.load(folder / name, load_external_data=False)
    except Exception as error:  # protobuf's own exceptions have no common base
        raise InvalidVersion(f"{folder / name} is not an ONNX model ({error}); export the version again") from error
    for tensor in _tensors_of(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if Path(location).name != location or location not in files:
            raise InvalidVersion(
                f"{folder / name} looks for the weight {tensor.name} in {location!r}; expected a file beside it that "
                "is listed in manifest.json: this graph would read other files of the machine, do not use it"
            )
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        if offset < 0 or length < 0 or offset + length > files[location]["size_bytes"]:
            raise InvalidVersion(
                f"{folder / name} looks for the weight {tensor.name} at bytes {offset}…{offset + length} of "
                f"{location}, which has {files[location]['size_bytes']}; export the version again"
            )


def _tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors of ``model`` that lie outside it, those of nested graphs, attributes and functions included."""
    nodes = [node for function in model.functions for node in function.node]
    graphs = [model.graph]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes += graph.node
            sparse = [tensor for both in graph.sparse_initializer for tensor in (both.values, both.indices)]
            yield from (tensor for tensor in [*graph.initializer, *sparse] if _is_external(tensor))
            continue
        for attribute in nodes.pop().attribute:
            yield from (tensor for tensor in [attribute.t, *attribute.tensors] if _is_external(tensor))
            graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL or bool(tensor.external_data)
