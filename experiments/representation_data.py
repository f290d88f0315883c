"""The labelled data sets of the representation experiment, and the one file that carries them to a machine.

The sets themselves lie outside the project, in ../shared/cells. `prepare_representations` reads them where
anndata is installed and writes expression, types, split and the baseline's embeddings of all of them into one
.npz file, which needs numpy and scipy alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from experiments.cell_splits import CellSplit
from experiments.cells import Cells

FOLDER = Path("../shared/cells")


@dataclass(frozen=True)
class Dataset:
    """A labelled data set.

    Attributes:
        name: In tables.
        file: Of the .h5ad file.
        label: Column of `.obs` with the cell types.
        group: Column whose values must not be on both sides of the split; None where the file has none.
        origin: Publication, and where the file was made from.
        is_control: Whether its types were told without its expression, and it stands apart in tables.
    """

    name: str
    file: Path
    label: str = "cell_type"
    group: str | None = None
    origin: str = "given on the command line"
    is_control: bool = False


def _shared(name: str, group: str | None, origin: str, *, is_control: bool = False) -> Dataset:
    return Dataset(name, FOLDER / f"{name}.h5ad", group=group, origin=origin, is_control=is_control)


DATASETS = {
    dataset.name: dataset
    for dataset in (
        _shared(
            "pbmc3k_human_blood",
            None,
            "10x Genomics 3k PBMC (Zheng et al., Nat Commun 8:14049, 2017); github.com/hmumme/scToolbox, "
            "labels github.com/zdebruine/RcppML",
        ),
        _shared(
            "crohn_human_gut",
            "donor_id",
            "Kong et al., Immunity 56:444 (2023), Single Cell Portal SCP1884; "
            "github.com/BiomedSciAI/biomed-multi-omic",
        ),
        _shared(
            "cortexculture_human_fetal_brain",
            "batch",
            "doi:10.1101/2025.07.28.667119, CZ CELLxGENE 1472129f-1945-481b-891a-cbb6aee004e6; "
            "github.com/AyushBhardwaj261/LoRA-Fine-Tuning-and-Deployment-of-SCimilarity",
        ),
        _shared(
            "endocrinogenesis_mouse_pancreas",
            None,
            "Bastidas-Ponce et al., Development 146:dev173849 (2019), GSE132188; "
            "github.com/JEFworks-Lab/veloviz",
        ),
        _shared(
            "marques_mouse_oligodendrocytes",
            "age",  # the finest mark there is: every animal has one age
            "Marques et al., Science 352:1326 (2016), GSE75330; github.com/chernolabs/scX",
        ),
        _shared(
            "packer_celegans_embryo_neurons",
            "batch",
            "Packer et al., Science 365:eaax1971 (2019), GSE126954; github.com/cole-trapnell-lab/monocle3",
        ),
        _shared(
            "scmixology_human_celllines",
            "batch",
            "Tian et al., Nat Methods 16:479 (2019), GSE118767; github.com/LuyiTian/sc_mixology",
            is_control=True,
        ),
    )
}


@dataclass(frozen=True)
class PreparedCells:
    """One data set, ready for training.

    Attributes:
        cells: Expression, genes and labels of all cells.
        split: Which of them train, choose and are held out.
        pca: [held-out cells, components] float32, the baseline's embeddings.
        is_control: See `Dataset`.
        groups: [cells] donor, batch or the like of each; None where the file names none.
    """

    cells: Cells
    split: CellSplit
    pca: NDArray[np.float32]
    is_control: bool
    groups: NDArray[np.str_] | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of genes, types, split and expression: all that a run is trained on and asked for.

        Groups are in the split and in the file of each run, so that cells prepared before groups were kept
        have the digest of the published trials.
        """
        expression = self.cells.expression
        found = hashlib.sha256()
        for names in (self.cells.genes, self.cells.labels):
            found.update(b"\0" if names is None else "\n".join(map(str, names)).encode() + b"\0")
        found.update(b"\0")
        for is_side in (self.split.is_test, self.split.is_validation):
            found.update(np.packbits(is_side).tobytes())
        for places in (expression.indptr, expression.indices):
            found.update(places.astype("<i8").tobytes())
        found.update(expression.data.astype("<f4").tobytes())
        return found.hexdigest()

    def side(self, is_chosen: NDArray[np.bool_]) -> Cells:
        """The cells of one side of the split."""
        assert self.cells.labels is not None
        return Cells(
            self.cells.expression[is_chosen],
            self.cells.genes,
            self.cells.labels[is_chosen],
            self.cells.source,
        )


def check_files(datasets: Sequence[Dataset]) -> None:
    """Say of every file that is not there where it comes from.

    Args:
        datasets: What is to be read.

    Raises:
        FileNotFoundError: A file is missing.
    """
    missing = [dataset for dataset in datasets if not dataset.file.is_file()]
    if missing:
        lines = [f"  {dataset.file}: {dataset.origin}" for dataset in missing]
        raise FileNotFoundError(
            "Expected labelled cells as .h5ad files; these are not there:\n"
            + "\n".join(lines)
            + "\nThey are no part of this project: put them there (counts in .X, types in .obs), leave them "
            "out with --datasets, or give a file of your own with --data FILE --label COLUMN."
        )


def write_prepared(path: Path, prepared: dict[str, PreparedCells]) -> None:
    """Write the file.

    Args:
        path: An .npz file; its folder is made.
        prepared: The data sets by name.
    """
    arrays: dict[str, NDArray[np.generic]] = {"names": np.array(list(prepared))}
    for name, each in prepared.items():
        expression = each.cells.expression
        few_genes = len(each.cells.genes) < 2**16
        arrays |= {
            f"{name}/values": expression.data,
            f"{name}/genes_of_values": expression.indices.astype(np.uint16 if few_genes else np.uint32),
            f"{name}/starts": expression.indptr.astype(np.int64),
            f"{name}/genes": each.cells.genes.astype(str),
            f"{name}/labels": np.asarray(each.cells.labels).astype(str),
            f"{name}/source": np.array(each.cells.source),
            f"{name}/is_test": each.split.is_test,
            f"{name}/is_validation": each.split.is_validation,
            f"{name}/rule": np.array(each.split.rule),
            f"{name}/pca": each.pca,
            f"{name}/is_control": np.array(each.is_control),
        }
        if each.groups is not None:
            arrays[f"{name}/groups"] = each.groups.astype(str)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # numpy would append .npz to another name
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def prepared_names(path: Path) -> list[str]:
    """The data sets of a prepared file.

    Args:
        path: Of `write_prepared`.

    Returns:
        Their names.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected prepared cells at {path}; there are none. Where {FOLDER} is, write them with "
            f"`python -m experiments.prepare_representations --out {path}` and take the file along."
        )
    with np.load(path) as content:
        return [str(name) for name in content["names"]]


def read_prepared(path: Path, name: str) -> PreparedCells:
    """One data set of a prepared file.

    Args:
        path: Of `write_prepared`.
        name: Of the data set.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not hold the data set.
    """
    if name not in (names := prepared_names(path)):
        raise ValueError(f"Expected the data set {name!r} in {path}; it holds {', '.join(names)}.")
    with np.load(path) as content:
        (values, genes_of_values, starts, genes, labels, source) = (
            content[f"{name}/{part}"]
            for part in ("values", "genes_of_values", "starts", "genes", "labels", "source")
        )
        split = CellSplit(
            content[f"{name}/is_test"], content[f"{name}/is_validation"], str(content[f"{name}/rule"])
        )
        pca, is_control = content[f"{name}/pca"], bool(content[f"{name}/is_control"])
        groups = content.get(f"{name}/groups")
    expression = sparse.csr_matrix(
        (values, genes_of_values.astype(np.int32), starts), shape=(len(starts) - 1, len(genes))
    )
    return PreparedCells(Cells(expression, genes, labels, str(source)), split, pca, is_control, groups)
