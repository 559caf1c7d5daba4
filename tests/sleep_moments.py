"""Where processes are stopped in the long form: at publishing steps of every format, and in every other stage."""

from __future__ import annotations

from sleep_storm import Moment

PUBLISHING = "connectomics.execution.publishing:"
FINISH = "connectomics.stages.output.finish:"
FILES = "connectomics.core.files:"
LEVELS = "connectomics.stages.output.formats.level_array:LevelArray."
FORMATS = ("h5", "zarr", "tiff", "png", "zarr2", "n5", "precomputed")
ENDINGS = (".h5", ".zarr", ".tif", "_png", ".v2.zarr", ".n5", ".precomputed")

RENAMES = tuple(
    Moment(f"between check and rename of {output} {form}", PUBLISHING + "rename", text=f"{output}.final.{form}'")
    for output, forms in (("labels", FORMATS), ("probabilities", ("h5", "n5")))
    for form in forms
)
DIGESTS = tuple(
    Moment(f"between check and rename of checksums {ending}", PUBLISHING + "rename", text=f"v_labels{ending}.sha256'")
    for ending in ENDINGS
)
BUILT = tuple(
    Moment(f"while the checksums of {form} are made", FINISH + "write_digests", text=f"labels.final.{form}'")
    for form in FORMATS
)
STEPS = (
    Moment("before the first check", PUBLISHING + "Staging.confirm"),
    Moment("after the first check", PUBLISHING + "Staging.confirm", after=True),
    Moment("after the second check", PUBLISHING + "Staging.confirm", 2, after=True),
    Moment("after a later check", PUBLISHING + "Staging.confirm", 9, after=True),
    Moment("after the names were confirmed", "connectomics.execution.name_claims:NameClaims.confirm", 4, after=True),
    Moment("as checksums are taken away", PUBLISHING + "Staging.take_away", 5),
    Moment("as the staging folder is made", PUBLISHING + "Staging.__enter__"),
    Moment("when all is published", PUBLISHING + "Staging.__exit__"),
    Moment("when the staging folder is gone", PUBLISHING + "Staging.__exit__", after=True),
    Moment("when a file is written", FINISH + "export_file", 1, after=True),
    Moment("as a file is compared", "connectomics.stages.output.export:_compare", 2),
    Moment("before a pyramid", FINISH + "_fill_pyramid", 2),
    Moment("as a pyramid is made anew", "connectomics.stages.output.pyramid:_create", 2, after=True),
    Moment("in a block of a level", LEVELS + "write", 2),
    Moment("after a block of a level", LEVELS + "write", 5, after=True),
    Moment("as a level is read back", LEVELS + "read", 4),
    Moment("before a block of a level is recorded", "connectomics.execution.ledger:Ledger.append", 2, "final.n5 level"),
    Moment("after a block of a level is recorded", "connectomics.execution.ledger:Ledger.append", 2, "n5 level", True),
    Moment("before the stamp", FINISH + "write_text", 1, "final.n5"),
    Moment("after the stamp", FINISH + "write_text", 1, "final.n5", after=True),
    Moment("before the provenance", FINISH + "Publisher.tell"),
    Moment("before the working store is removed", FILES + "discard", text="labels.zarr'"),
    Moment("before sealing", FINISH + "seal"),
    Moment("before tidying", FINISH + "settle"),
    Moment("in tidying", FINISH + "discard_stores"),
    Moment("before the claims are retired", "connectomics.execution.name_claims:retire"),
    Moment("before it leaves", "connectomics.execution.worker:Worker.leave"),
    Moment("when it has left", "connectomics.execution.worker:Worker.leave", after=True),
)
AT_PUBLISHING = (*RENAMES, *DIGESTS, *BUILT, *STEPS)

ELSEWHERE = (
    Moment("before it joins", "connectomics.execution.worker:Worker.join"),
    Moment("when it has joined", "connectomics.execution.worker:Worker.join", after=True),
    Moment("before it claims names", "connectomics.execution.name_claims:NameClaims.__enter__"),
    Moment("before the survey is kept", "connectomics.stages.survey.survey:save_survey"),
    Moment("before the ledger", "connectomics.runs.volume:_prepare"),
    Moment("after the ledger", "connectomics.runs.volume:_prepare", after=True),
    Moment("as the working store is made", "connectomics.volumes.store:create_store", 2),
    Moment("in a block", "connectomics.volumes.store:Store.write", 3),
    Moment("as a block is read back", "connectomics.volumes.store:Store.checksum", 4),
    Moment("before a block is recorded", "connectomics.execution.ledger:Ledger.append", 4),
    Moment("after a block is recorded", "connectomics.execution.ledger:Ledger.append", 5, after=True),
    Moment("as a block is taken", "connectomics.execution.worker:Worker.acquire", 6, after=True),
    Moment("as a block is given back", "connectomics.execution.worker:Worker.release", 5),
    Moment("as a record is changed", "connectomics.execution.coordination:DiskStore._make", 20),
    Moment("before the filter", "connectomics.stages.predict.filters:filter_store"),
    Moment("in the filter", "connectomics.objects.arrays:save", 3),
    Moment("after the filter", "connectomics.stages.predict.filters:filter_store", after=True),
    Moment("in pieces of objects", "connectomics.objects.arrays:save", 60, after=True),
    Moment("in tables of objects", "connectomics.stages.decode.context:StepContext.made", 5),
    Moment("in later tables of objects", "connectomics.stages.decode.context:StepContext.made", 7, after=True),
    Moment("before a stage of decoding", "connectomics.stages.decode.context:StepContext.do", 9),
    Moment("as objects are painted", "connectomics.volumes.store:Store.write", 40),
    Moment("in the table of objects", "connectomics.objects.table:write_table"),
    Moment("between check and rename of objects", PUBLISHING + "rename", text="objects.final.zarr2'"),
    Moment("between check and rename of the table", PUBLISHING + "rename", text=".parquet'"),
)
IN_THE_C_LIBRARY = (
    ("fsync", "labels.zarr/0/c", 3),
    ("rename", "labels.zarr/0/c", 4),
    ("write", "labels.final.h5", 2),
    ("fsync", "labels.final.n5", 3),
    ("rename", "labels.final.n5/s0", 2),
    ("rename", "labels.final.zarr2", 3),
    ("mkdir", "labels.final.n5/s0", 2),
    ("rename", "labels.final.precomputed", 1),
    ("unlink", "staging.", 2),
    ("rmdir", "staging.", 1),
)
"""Functions of the C library, texts in their paths and numbers of calls: within TensorStore, HDF5 and Python."""
PAIRS = (
    ("after the first check", "after the second check"),
    ("after a block of a level is recorded", "in a block of a level"),
    ("in a block of a level", "after the first check"),
    ("between check and rename of labels h5", "in a block of a level"),
    ("as a record is changed", "before a block is recorded"),
    ("in a block", "before tidying"),
    ("before tidying", "before it joins"),
    ("after the ledger", "between check and rename of labels n5"),
    ("when all is published", "when the staging folder is gone"),
    ("as a block is taken", "in a block"),
    ("before the stamp", "as a level is read back"),
    ("in pieces of objects", "in tables of objects"),
)
"""The first process stops at one, the second at the other; then the first goes on while the second stands still."""
BY_NAME = {moment.name: moment for moment in (*AT_PUBLISHING, *ELSEWHERE)}
