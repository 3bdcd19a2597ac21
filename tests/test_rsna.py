"""The competition's files, where they cross modules: phantoms on disk, other readers, whole tables."""

import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cspine.dicom import Volume, read_series, write_series
from cspine.presets import LEVELS, TARGETS, CspineError
from cspine.rsna import (MaskError, TableError, best_constant, find_studies, folds, metric, read_mask, read_submission,
                         read_test, read_train, score, test_rows, validate_uid, write_mask, write_submission, write_whole)

RATES = [0.07, 0.14, 0.04, 0.05, 0.08, 0.14, 0.19]


def labels_table(n, seed=0):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame((rng.random((n, 7)) < RATES).astype(int), columns=list(LEVELS), index=[f"1.2.{i}" for i in range(n)])
    return df.assign(patient_overall=df.max(axis=1)).rename_axis("StudyInstanceUID")


def study(seed=0):
    """A small oblique series and a label map on its grid."""
    rng = np.random.default_rng(seed)
    hu = rng.normal(100, 200, (7, 12, 10)).astype(np.int16)
    affine = np.array([[0, 0, 0.4, -80.5], [0, 0.4, 0, -20.25], [-0.7, 0, 0, 310], [0, 0, 0, 1]])
    return hu, affine, rng.integers(0, 9, hu.shape).astype(np.uint8)


def test_a_mask_and_a_series_from_disk_meet(tmp_path):
    hu, affine, labels = study()
    volume = read_series(write_series(hu, affine, tmp_path / "1.2.3", uid="1.2.3"))
    write_mask(labels, affine, tmp_path / "1.2.3.nii")
    assert np.array_equal(read_mask(tmp_path / "1.2.3.nii", volume), labels)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_any_number_type_and_compression(tmp_path, dtype, suffix):
    hu, affine, labels = study()
    nib.save(nib.Nifti1Image(labels.astype(dtype), np.diag([-1, -1, 1, 1]) @ affine), tmp_path / f"m{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"m{suffix}", Volume(hu, affine)), labels)


def test_a_mask_as_the_dicom_converters_write_it(tmp_path):
    """First axis to the left, rows back to front, slices feet to head: what dcm2niix makes of an axial series."""
    hu, affine, labels = study()
    stored = labels.transpose(2, 1, 0)[:, ::-1, ::-1]
    ras = np.diag([-0.4, 0.4, 0.7, 1.0])
    ras[:3, 3] = [80.5, 20.25 - 0.4 * 11, 310 - 0.7 * 6]
    nib.save(nib.Nifti1Image(stored, ras), tmp_path / "m.nii")
    assert nib.aff2axcodes(ras) == ("L", "A", "S")
    assert np.array_equal(read_mask(tmp_path / "m.nii", Volume(hu, affine)), labels)


@pytest.mark.parametrize("change", ["shape", "shift", "spacing", "turned", "no affine"])
def test_a_mask_of_another_scan_is_refused_with_both_geometries(tmp_path, change):
    hu, affine, labels = study()
    other = affine.copy()
    if change == "shape":
        labels = labels[1:]
    if change == "shift":
        other[2, 3] += 0.7
    if change == "spacing":
        other[:3, 1] *= 1.05
    if change == "turned":
        a = np.deg2rad(20)
        other[:3, :3] = [[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]] @ other[:3, :3]
    write_mask(labels, other, tmp_path / "m.nii")
    if change == "no affine":
        img = nib.load(tmp_path / "m.nii")
        img = nib.Nifti1Image(np.asarray(img.dataobj), None)
        nib.save(img, tmp_path / "m.nii")
    with pytest.raises(MaskError, match=r"mask 12 x [67] x 10 voxels .* scan 7 x 12 x 10 voxels"):
        read_mask(tmp_path / "m.nii", Volume(hu, affine))


@pytest.mark.parametrize("content, says", [(b"not a nifti", "cannot be read as NIfTI"), (b"", "cannot be read as NIfTI"), (None, "does not exist")])
def test_what_is_no_mask(tmp_path, content, says):
    hu, affine, labels = study()
    if content is not None:
        (tmp_path / "m.nii").write_bytes(content)
    with pytest.raises(MaskError, match=says):
        read_mask(tmp_path / "m.nii", Volume(hu, affine))


def test_a_mask_cut_off(tmp_path):
    hu, affine, labels = study()
    path = write_mask(labels, affine, tmp_path / "m.nii")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MaskError, match="cannot be read as NIfTI"):
        read_mask(path, Volume(hu, affine))


def test_a_mask_with_values_of_another_kind(tmp_path):
    hu, affine, labels = study()
    values = labels.astype(np.float32)
    for wrong in (0.5, -1, 20, np.nan):
        values[0, 0, 0] = wrong
        nib.save(nib.Nifti1Image(values, np.diag([-1, -1, 1, 1]) @ affine), tmp_path / "m.nii")
        with pytest.raises(MaskError, match="whole numbers from 0 to 19"):
            read_mask(tmp_path / "m.nii", Volume(hu, affine))


def test_tables_survive_a_spreadsheet(tmp_path):
    plain = labels_table(40)
    plain.to_csv(tmp_path / "a.csv")
    mixed = plain.reset_index().assign(age=50, remark='said "no", left').sample(frac=1, random_state=0)
    mixed = mixed[sorted(mixed.columns, key=lambda c: c[::-1])]
    mixed.to_csv(tmp_path / "b.csv", index=False, encoding="utf-8-sig", lineterminator="\r\n")
    a, b = read_train(tmp_path / "a.csv"), read_train(tmp_path / "b.csv")
    pd.testing.assert_frame_equal(a, plain)
    assert list(b.index) == mixed["StudyInstanceUID"].tolist()
    pd.testing.assert_frame_equal(b.loc[a.index], a)


def test_a_quoted_line_break_does_not_shift_the_line(tmp_path):
    (tmp_path / "t.csv").write_text(
        'row_id,StudyInstanceUID,prediction_type,remark\n1.2_C1,1.2,C1,"two\nlines"\n1.2_C2,1.2,C2,\n1.2_C9,1.2,C9,\n'
    )
    with pytest.raises(TableError, match="line 5: prediction_type: 'C9'"):
        read_test(tmp_path / "t.csv")


@pytest.mark.parametrize("uid", ["1.2.3", "0", "1." * 31 + "12", "1.2.826.0.1.3680043.5876"])
def test_uids(uid):
    assert validate_uid(uid) == uid


@pytest.mark.parametrize("uid", ["", ".", "..", "1..2", ".1", "1.", "1 2", "1.2/../3", "C:1", "1.2\x00", "1\n", "1" * 65, "1.2-3"])
def test_no_uids(uid):
    with pytest.raises(TableError):
        validate_uid(uid)


def test_layouts(tmp_path):
    for name in ("1.2.10", "1.2.9", ".ipynb_checkpoints"):
        (tmp_path / "scans" / name).mkdir(parents=True)
    (tmp_path / "scans" / "notes.txt").touch()
    assert list(find_studies(tmp_path / "scans", "test")) == ["1.2.10", "1.2.9"]
    assert test_rows(tmp_path / "scans")["row_id"].tolist() == [f"{u}_{t}" for u in ("1.2.10", "1.2.9") for t in TARGETS]
    (tmp_path / "data" / "test_images").mkdir(parents=True)
    (tmp_path / "scans" / "1.2.9").rename(tmp_path / "data" / "test_images" / "1.2.9")
    assert list(find_studies(tmp_path / "data", "test")) == ["1.2.9"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1.dcm").touch()
    with pytest.raises(TableError, match="it is one study"):
        find_studies(tmp_path / "one", "test")
    (tmp_path / "only_train" / "train_images").mkdir(parents=True)
    (tmp_path / "only_train" / "segmentations").mkdir()
    with pytest.raises(TableError, match="no test_images"):
        test_rows(tmp_path / "only_train")


def test_a_link_is_followed_and_a_device_is_left_alone(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    write_whole(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CspineError, match="is a folder or a device"):
            write_whole(path, "new")
    assert (tmp_path / "pipe").is_fifo()


def test_folds_are_whole_balanced_and_the_same_everywhere():
    df = labels_table(2019)
    f = folds(df)
    assert f.value_counts().max() - f.value_counts().min() <= 8
    count = df.groupby(f).sum()
    apart = count.max() - count.min()
    # C7 is dealt out last, with what the patient's label leaves of it; a split at random is this far apart everywhere
    assert (apart.drop("C7") <= 2).all() and apart["C7"] <= 25, count
    assert f.index.is_unique and set(f.index) == set(df.index)
    again = folds(df.sample(frac=1, random_state=3).sort_values("C7", kind="stable"))
    pd.testing.assert_series_equal(f, again)


def test_score_of_a_phantoms_tables(tmp_path):
    y = labels_table(60)
    y.to_csv(tmp_path / "truth.csv")
    rng = np.random.default_rng(1)
    rows = [(f"{u}_{t}", np.clip(0.7 * y.loc[u, t] + rng.uniform(0, 0.3), 0, 1)) for u in y.index for t in TARGETS]
    rng.shuffle(rows)
    sub = pd.DataFrame(rows, columns=["row_id", "fractured"]).astype({"fractured": float})
    s = score(tmp_path / "truth.csv", write_submission(sub, tmp_path / "s.csv"))
    # the definition once more, exam by exam in plain Python
    p, total = dict(zip(sub["row_id"], sub["fractured"])), 0
    for u in y.index:
        w = {t: (7 if t == "patient_overall" else 1) * (1 + y.loc[u, t]) for t in TARGETS}
        loss = {t: -np.log(p[f"{u}_{t}"] if y.loc[u, t] else 1 - p[f"{u}_{t}"]) for t in TARGETS}
        total += sum(w[t] * loss[t] for t in TARGETS) / sum(w.values())
    assert s["score"] == pytest.approx(total / len(y), abs=1e-7)
    assert s["half"] == pytest.approx(np.log(2)) and s["score"] < s["best_constant"] < s["half"]
    assert s["table"].index.tolist() == list(TARGETS) and (s["table"]["auroc"].dropna() == 1).all()
    assert best_constant(y)["C2"] == pytest.approx(2 * y["C2"].mean() / (1 + y["C2"].mean()))
    assert metric(y, y * 0.0) > 5  # certain and wrong costs a lot, but a number


@pytest.mark.parametrize("text, says", [
    ("row_id,fractured\n1.2.0_C1,1.5\n", "line 2: fractured: '1.5' is outside 0 to 1"),
    ("row_id,fractured\n1.2.0_C1,nan\n", "line 2: fractured: 'nan' is not a finite number"),
    ("row_id,fractured\n1.2.0_C1,\n", "line 2: fractured: '' is not a number"),
    ("row_id,fractured\n1.2.0_C1,.5\n1.2.0_C1,.5\n", "line 3: 1.2.0_C1 is already on line 2"),
    ("row_id,fractured\n1.2.0_C1,.5\n7.7_C1,.5\n", "line 3: 7.7_C1 is not a row of"),
    ("row_id,fractured\n1.2.0_C1,.5\n", "lacks 1.2.0_C2 and 14 more rows"),
    ("row_id,probability\n", "no column fractured"),
])
def test_a_submission_that_cannot_be_scored(tmp_path, text, says):
    labels_table(2).to_csv(tmp_path / "truth.csv")
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(TableError, match=says.replace(".", r"\.")):
        score(tmp_path / "truth.csv", tmp_path / "s.csv")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    df = pd.DataFrame({"row_id": ["1.2_C1"], "fractured": [0.5]})
    write_submission(df, tmp_path / "s.csv")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_submission(df.assign(fractured=0.1), tmp_path / "s.csv")
    assert read_submission(tmp_path / "s.csv")["fractured"].tolist() == [0.5]
    assert [p.name for p in tmp_path.iterdir()] == ["s.csv"]


def test_importing_tables_does_not_load_torch():
    code = "import cspine.rsna, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
