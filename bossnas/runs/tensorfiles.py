"""The tensors of a checkpoint in the files of torch.distributed.checkpoint (DCP): written in shares, read by any."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

INDEX = ".metadata"
FAILURES = (Exception, dcp.api.CheckpointException)  # the latter is a BaseException
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # DCP, of every run with one process


def write(folder: Path, tensors: dict[str, Tensor], group: Any) -> None:
    """Writes and syncs ``tensors`` of all ranks of ``group``, which call it together; None: of this process alone.

    A name that several ranks have means the same tensor, plain, or a DTensor of which each holds its share. Fails on
    all ranks with one of FAILURES if it fails on one.
    """
    dcp.save(
        tensors,
        storage_writer=_Writer(folder),
        process_group=group,
        no_dist=group is None,
        planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
    )


def read_into(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills ``tensors``, plain or DTensors, with those of the same names; no other rank is needed. Fails with one of
    FAILURES, such as where one is missing or has another shape."""
    dcp.load(
        tensors,
        storage_reader=_Reader(folder),
        no_dist=True,
        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
    )


def index(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor, by name."""
    found: dict[str, Any] = _Reader(folder).read_metadata().state_dict_metadata  # of tensors alone, see `write`
    return {name: (entry.size, entry.properties.dtype) for name, entry in found.items()}


class _Writer(FileSystemWriter):
    """DCP's files, with two differences: the system's error comes out of torch.save, and no path lies in the index."""

    def write_data(self, *args: Any) -> Any:
        try:
            return super().write_data(*args)
        except Exception as error:
            number = errno_of(error)
            if not number:
                raise
            raise OSError(number, os.strerror(number)) from error  # the cause does not travel to other ranks

    def storage_meta(self) -> records.StorageMeta:
        return records.StorageMeta()


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> records.Metadata:
        with open(Path(self.path) / INDEX, "rb") as file:
            return _IndexUnpickler(file).load()


class _IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index, a pickle, and refuses all but DCP's records, shapes and dtypes."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "torch.serialization": {"_get_layout"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"its index holds {module}.{name}")
        return super().find_class(module, name)


def text_of(error: BaseException) -> str:
    """One line about ``error``; of DCP's, about the first of the errors that it collected."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def errno_of(error: BaseException | None) -> int:
    """The system's error number behind ``error``; torch.save turns an OSError into a RuntimeError."""
    if isinstance(error, dcp.api.CheckpointException):
        return max(errno_of(failure[0]) for failure in error.failures.values())
    while error is not None:
        if isinstance(error, OSError):
            return error.errno or 0
        error = error.__cause__ or error.__context__
    return 0
