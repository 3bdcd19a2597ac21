"""The competition's files, where they cross modules: phantoms on disk, other readers, whole tables."""

import itertools
import os
import re
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cspine.dicom import Volume, read_series, write_series
from cspine.presets import LEVELS, TARGETS, CspineError
from cspine.rsna import (MaskError, TableError, _per_exam, best_constant, find_studies, folds, metric, read_boxes, read_folds, read_mask,
                         read_submission, read_test, read_labels, read_train, score, split_80_20, test_rows, validate_uid, versus_constant, write_folds,
                         write_mask, write_submission, write_whole)
from scipy.optimize import minimize_scalar
from scipy.spatial.transform import Rotation
from sklearn.metrics import log_loss

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


def oblique(seed):
    """A grid far off the patient's axes, with three different voxel sizes: index (z, y, x) -> LPS mm."""
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    turn = Rotation.from_euler("xyz", rng.uniform(-25, 25, 3), degrees=True).as_matrix()
    affine[:3, :3] = turn @ np.array([[0, 0, 0.31], [0, 0.45, 0], [-0.83, 0, 0]])
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


@pytest.mark.parametrize("gzip, form", [("", "sform"), (".gz", "qform"), ("", "both")])
def test_all_48_orders_of_axes_by_their_millimetres(tmp_path, gzip, form):
    """Every voxel of the file is looked up in the scan by its place in the patient, which `read_mask` does not do."""
    ras, codes = np.diag([-1.0, -1, 1, 1]), set()
    for i, (order, signs) in enumerate(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))):
        affine, shape = oblique(i), (5, 6, 7)
        truth = np.random.default_rng(i).integers(0, 20, shape).astype(np.uint8)
        ornt = np.array(list(zip(order, signs)))
        stored = np.ascontiguousarray(nib.apply_orientation(truth, ornt))
        there = ras @ affine @ nib.orientations.inv_ornt_aff(ornt, shape)
        img = nib.Nifti1Image(stored, None)
        img.set_sform(there if form != "qform" else None, int(form != "qform"))
        img.set_qform(there if form != "sform" else None, int(form != "sform"))
        nib.save(img, tmp_path / f"m.nii{gzip}")
        codes.add(nib.aff2axcodes(nib.load(tmp_path / f"m.nii{gzip}").affine))
        at = np.indices(stored.shape).reshape(3, -1)
        mm = ras @ there @ np.vstack([at, np.ones(at.shape[1])])
        z, y, x = np.rint(np.linalg.inv(affine) @ mm)[:3].astype(int)
        expected = np.full(shape, 255, np.uint8)
        expected[z, y, x] = np.minimum(stored[tuple(at)], 8)
        assert np.array_equal(read_mask(tmp_path / f"m.nii{gzip}", Volume(truth.astype(np.int16), affine)), expected)
    assert len(codes) == 48


def test_a_sagittal_file_read_without_its_affine_is_flipped_and_mirrored(tmp_path):
    """The competition's: sagittal slices; axes moved to (z, y, x) but not turned, the head is below and left is right."""
    hu, affine, labels = study()
    stored = nib.load(write_mask(labels, affine, tmp_path / "m.nii"))
    naive = np.asarray(stored.dataobj).transpose(1, 0, 2)
    assert naive.shape == labels.shape and not np.array_equal(naive, labels)
    assert np.array_equal(read_mask(tmp_path / "m.nii", Volume(hu, affine)), naive[::-1, :, ::-1])
    # by hand: 1 at the top, 2 in front, 3 at the patient's right, each one voxel, in a file of another sagittal order
    ras = np.array([[0, 0, -0.4, 80.5], [0.4, 0, 0, 15.85], [0, -0.7, 0, 310], [0, 0, 0, 1]])   # A, I, L
    values = np.zeros((12, 7, 10), np.uint8)
    values[5, 0, 4], values[11, 3, 4], values[5, 3, 0] = 1, 2, 3
    nib.save(nib.Nifti1Image(values, ras), tmp_path / "m.nii")
    assert nib.aff2axcodes(ras) == ("A", "I", "L")
    got = read_mask(tmp_path / "m.nii", Volume(hu, affine))
    assert [np.argwhere(got == v).tolist() for v in (1, 2, 3)] == [[[0, 6, 4]], [[3, 0, 4]], [[3, 6, 0]]]


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


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("change", ["half a voxel", "minus half a voxel", "1% wider", "a voxel more", "a voxel less"])
def test_a_mask_that_is_nearly_on_the_scan(tmp_path, axis, change):
    shape, n = [60, 61, 62], 60 + axis
    affine, there = oblique(axis), np.eye(4)
    volume = Volume(np.zeros(shape, np.int16), affine)
    if "half" in change:
        there[axis, 3] = -0.5 if "minus" in change else 0.5
    if change == "1% wider":
        there[axis, axis] = 1.01
    if "a voxel" in change and "half" not in change:
        shape[axis] = n + (1 if "more" in change else -1)
    write_mask(np.zeros(shape, np.uint8), affine @ there, tmp_path / "m.nii")
    with pytest.raises(MaskError, match="does not lie on the scan"):
        read_mask(tmp_path / "m.nii", volume)


def test_the_message_says_both_geometries(tmp_path):
    hu, affine, labels = study()
    other = affine @ np.array([[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1.25, 0], [0, 0, 0, 1]])
    path = write_mask(labels, other, tmp_path / "m.nii")
    with pytest.raises(MaskError) as e:
        read_mask(path, Volume(hu, affine))
    assert str(e.value) == (
        f"{path} does not lie on the scan: "
        "mask 12 x 7 x 10 voxels (PSR), 0.4 x 0.7 x 0.5 mm, first voxel at (-76.00, -20.25, 304.40) mm LPS; "
        "scan 7 x 12 x 10 voxels (z, y, x), 0.7 x 0.4 x 0.4 mm, first voxel at (-80.50, -20.25, 310.00) mm LPS. "
        "Is it the mask of this study?")


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


@pytest.mark.parametrize("dtype, says", [([("R", "u1"), ("G", "u1"), ("B", "u1")], "'R'.* values"), (np.complex64, "complex64 values")], ids=["rgb", "complex"])
def test_a_mask_of_what_are_no_numbers(tmp_path, dtype, says):
    hu, affine, labels = study()
    nib.save(nib.Nifti1Image(np.zeros(labels.shape, dtype), np.diag([-1, -1, 1, 1]) @ affine), tmp_path / "m.nii")
    with pytest.raises(MaskError, match=f"m.nii holds .*{says}: a mask has whole numbers from 0 to 19"):
        read_mask(tmp_path / "m.nii", Volume(hu, affine))


def test_a_header_that_claims_27_tera_voxels_costs_nothing(tmp_path):
    hu, affine, labels = study()
    path = write_mask(labels, affine, tmp_path / "m.nii")
    b = bytearray(path.read_bytes())
    b[42:48] = np.full(3, 30000, "<i2").tobytes()   # dim[1:4]
    path.write_bytes(b)
    with pytest.raises(MaskError, match="does not lie on the scan: mask 30000 x 30000 x 30000 voxels"):
        read_mask(path, Volume(hu, affine))


def test_an_error_without_a_text_is_said_by_its_kind(tmp_path, monkeypatch):
    hu, affine, labels = study()
    path = write_mask(labels, affine, tmp_path / "m.nii")

    def full(*args, **kw):
        raise MemoryError

    monkeypatch.setattr(nib.arrayproxy.ArrayProxy, "__array__", full)
    with pytest.raises(MaskError, match="m.nii cannot be read as NIfTI .MemoryError.: copy it again"):
        read_mask(path, Volume(hu, affine))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearly_whole_numbers_are_whole(tmp_path, dtype):
    hu, affine, labels = study()
    off = np.random.default_rng(0).uniform(-9e-4, 9e-4, labels.shape)
    nib.save(nib.Nifti1Image((labels + off).astype(dtype), np.diag([-1, -1, 1, 1]) @ affine), tmp_path / "m.nii")
    assert np.array_equal(read_mask(tmp_path / "m.nii", Volume(hu, affine)), labels)


@pytest.mark.parametrize("value, says", [(1.002, "1.002"), (1.0015625, "1.0015625"), (19.5, "19.5"), (np.inf, "inf")])
def test_the_value_that_is_refused_is_said_in_full(tmp_path, value, says):
    hu, affine, labels = study()
    values = labels.astype(np.float64)
    values[3, 4, 5] = value
    nib.save(nib.Nifti1Image(values, np.diag([-1, -1, 1, 1]) @ affine), tmp_path / "m.nii")
    with pytest.raises(MaskError, match=f"holds the value {says}: a mask"):
        read_mask(tmp_path / "m.nii", Volume(hu, affine))


@pytest.mark.parametrize("wrong", [None, 3.5])
def test_what_is_no_path(wrong):
    hu, affine, _ = study()
    for read in (read_train, read_test, read_boxes, read_submission, read_folds):
        with pytest.raises(TableError, match=f"^{wrong} is not a path: name a CSV file$"):
            read(wrong)
    with pytest.raises(MaskError, match=f"^{wrong} is not a path: name a NIfTI file$"):
        read_mask(wrong, Volume(hu, affine))


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


@pytest.mark.parametrize("name", ["{}.dcm", "{}.DCM", "IM{}", "1.2.840.{}"])
def test_the_folder_of_one_study_is_told_from_one_of_studies(tmp_path, name):
    hu, affine, _ = study()
    for p in list(write_series(hu, affine, tmp_path / "data").iterdir()):
        p.rename(p.with_name(name.format(p.stem)))
    (tmp_path / "data" / "notes.txt").write_text("no slice")
    with pytest.raises(TableError, match="data holds slices, so it is one study: give the folder that contains it"):
        find_studies(tmp_path / "data", "test")
    assert list(find_studies(tmp_path, "test")) == ["data"]


def test_the_index_of_a_disk_is_no_slice(tmp_path):
    (tmp_path / "1.2").mkdir()
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    assert list(find_studies(tmp_path, "test")) == ["1.2"]


@pytest.mark.parametrize("text", ["0.1_5", "0_1", "1_0e-1", "１", "٠.٥", "０"])
def test_only_plain_decimal_numbers(tmp_path, text):
    (tmp_path / "s.csv").write_text(f"row_id,fractured\n1.2_C1,{text}\n", encoding="utf-8")
    with pytest.raises(TableError, match=f"line 2: fractured: '{text}' is not a plain decimal number"):
        read_submission(tmp_path / "s.csv")
    (tmp_path / "t.csv").write_text(f"StudyInstanceUID,{','.join(TARGETS)}\n1.2,1,{text},0,0,0,0,0,0\n", encoding="utf-8")
    with pytest.raises(TableError, match=f"line 2: {TARGETS[1]}: '{text}' is not a plain"):
        read_train(tmp_path / "t.csv")
    (tmp_path / "f.csv").write_text(f"StudyInstanceUID,fold\n1.2,{text}\n", encoding="utf-8")
    with pytest.raises(TableError, match="line 2: fold: .* is not a plain"):
        read_folds(tmp_path / "f.csv")


@pytest.mark.parametrize("text", ["0", "1", "1.", ".5", "0.5", "+0.5", "5e-1", "2.5E-05", "1e0", "-0", "00.5"])
def test_every_plain_decimal_number(tmp_path, text):
    (tmp_path / "s.csv").write_text(f"row_id,fractured\n1.2_C1,{text}\n")
    assert read_submission(tmp_path / "s.csv")["fractured"].tolist() == [float(text)]


@pytest.mark.parametrize("row, says", [
    ("1.2,-1000,20,5,6,7", "line 5: the box from -1000, 20, of 5 x 6, lies outside the slice$"),
    ("1.2,10,-6,5,6,7", "line 5: the box from 10, -6, of 5 x 6, lies outside"),
])
def test_boxes_that_are_nowhere(tmp_path, row, says):
    path = tmp_path / "x.csv"
    sound = "StudyInstanceUID,x,y,width,height,slice_number\n1.2,10,20,5,6,7\n1.2,11,20,5,6,7\n1.2,-3,-2,5,6,8\n"   # two on a slice, one over its edge
    path.write_text(sound)
    assert len(read_boxes(path)) == 3
    path.write_text(sound + row + "\n1.2,1,1,1,1,9\n")
    with pytest.raises(TableError, match=says):
        read_boxes(path)


def test_a_box_that_is_twice_there_is_taken_once_and_said(tmp_path, capsys):
    path = tmp_path / "x.csv"
    path.write_text("StudyInstanceUID,x,y,width,height,slice_number\n1.2,10,20,5,6,7\n1.2,11,20,5,6,7\n1.2,10.0,20,5,6,7\n")
    assert read_boxes(path).x.tolist() == [10, 11]
    assert capsys.readouterr().err == f"{path}, line 4: the box is already there; taken once\n"
    with open(path, "a") as f: f.write("1.2,11,20,5,6,7\n1.2,12,20,5,6,7\n")
    assert read_boxes(path).x.tolist() == [10, 11, 12]
    assert capsys.readouterr().err == f"{path}, line 4: the box is already there; taken once, as are 1 more\n"


def test_a_header_alone_is_no_table_of_labels_but_one_of_no_boxes(tmp_path):
    (tmp_path / "t.csv").write_text(f"StudyInstanceUID,{','.join(TARGETS)}\n\n")
    with pytest.raises(TableError, match="t.csv names no study below its header: one row per study"):
        read_train(tmp_path / "t.csv")
    (tmp_path / "x.csv").write_text("StudyInstanceUID,x,y,width,height,slice_number\n")
    assert len(read_boxes(tmp_path / "x.csv")) == 0


def test_another_folder_than_the_data_is_said(tmp_path):
    (tmp_path / "d" / "train_images").mkdir(parents=True)
    (tmp_path / "d" / "train.csv").write_text(f"StudyInstanceUID,{','.join(TARGETS)}\n1.2,{','.join('0'*8)}\n")
    assert read_labels(tmp_path / "d").index.tolist() == ["1.2"]
    for wrong, says in (("d/train.csv", "is a file"), ("nowhere", "does not exist"), ("d/train_images", f"has no train.csv: .* here {tmp_path}/d$"), (".", "has no train.csv: [^,]*$")):
        with pytest.raises(TableError, match=says): read_labels(tmp_path / wrong)


def big_table():
    """1,500 studies, 12,000 rows, columns and rows shuffled, with a column of anything."""
    rows = [(f"{u}_{t}", u, t) for u in (f"1.2.{i}" for i in range(1500)) for t in TARGETS]
    df = pd.DataFrame(rows, columns=["row_id", "StudyInstanceUID", "prediction_type"])
    df["note"] = np.resize(['two\nlines, "quoted"', "", "é\u2028\x85\x0b\x0c\x1c", "; ' \t", "0"], len(df))
    return df.sample(frac=1, random_state=1)[["note", "prediction_type", "row_id", "StudyInstanceUID"]]


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_12000_rows_keep_their_order(tmp_path, encoding, ends):
    df = big_table().iloc[:, [1, 2, 0, 3]]   # a byte order mark would spoil the first column's name
    df.to_csv(tmp_path / "test.csv", index=False, encoding=encoding, lineterminator=ends)
    start = time.perf_counter()
    rows = test_rows(tmp_path)
    assert time.perf_counter() - start < 20
    assert rows.columns.tolist() == ["row_id", "StudyInstanceUID", "prediction_type"]
    assert rows.values.tolist() == df[rows.columns].values.tolist()
    answers = rows.assign(fractured=np.linspace(0, 1, len(rows)))
    again = read_submission(write_submission(answers, tmp_path / "s.csv"))
    assert again["row_id"].tolist() == df["row_id"].tolist()
    assert np.allclose(again["fractured"], answers["fractured"], atol=1e-9)


@pytest.mark.parametrize("broken, says", [
    ("1.2.7_C1,C1,1.2.7", "3 values, but the header names 4 columns"),
    (",C9,1.2.7_C9,1.2.7", "prediction_type: 'C9' is none of C1"),
    (",C1,1.2.9999_C1,1.2.7", "row_id 1.2.9999_C1 should be 1.2.7_C1"),
    (",C1,../7_C1,../7", "StudyInstanceUID: '../7' is not a StudyInstanceUID"),
    (",C1,,1.2.7", "row_id: is empty"),
    ('a"b,C1,"1.2.7_C1"x,1.2.7', "',' expected after '\"'"),
    ('"never closed,C1,1.2.7_C1,1.2.7', "',' expected after"),      # it ends at the next quote, lines below
    ("again", "is already on line"),
])
def test_one_bad_row_among_12000_is_named_by_its_line(tmp_path, broken, says):
    text = big_table().to_csv(index=False)
    ends = [m.end() for m in re.finditer("1[.]2[.][0-9]+\n", text)]     # of records: some take two lines
    at = ends[9000]
    if broken == "again":
        broken = text[ends[4000]:ends[4001]].rstrip("\n")
        says = f"is already on line {text.count(chr(10), 0, ends[4000]) + 1}$"
    (tmp_path / "test.csv").write_bytes((text[:at] + broken + "\n" + text[at:]).encode("utf-8-sig"))
    line = text.count("\n", 0, at) + 1
    assert line > 9002                                                # the quoted line breaks count
    with pytest.raises(TableError, match=f"line {line}: .*{says}"):
        read_test(tmp_path / "test.csv")


@pytest.mark.parametrize("encoding, note, says", [
    ("utf-16", "", "is not UTF-8 text .* save it as CSV UTF-8"),
    ("utf-16-le", "", "line 1: (no column row_id, fractured.* not UTF-16|line contains NUL)"),   # the latter from Python 3.10
    ("utf-16-le", "é", "is not UTF-8 text"),
    ("latin-1", "é", "is not UTF-8 text"),
])
def test_another_encoding_is_said(tmp_path, encoding, note, says):
    (tmp_path / "t.csv").write_bytes(f"row_id,fractured,note\n1.2_C1,0.5,{note}\n".encode(encoding))
    with pytest.raises(TableError, match=says):
        read_submission(tmp_path / "t.csv")


def test_semicolons_are_said(tmp_path):
    (tmp_path / "t.csv").write_text("row_id;fractured\n1.2_C1;0,5\n")
    with pytest.raises(TableError, match="line 1: no column row_id, fractured;.*with commas, not semicolons"):
        read_submission(tmp_path / "t.csv")


def test_a_quoted_line_break_does_not_shift_the_line(tmp_path):
    (tmp_path / "t.csv").write_text(
        'row_id,StudyInstanceUID,prediction_type,remark\n1.2_C1,1.2,C1,"two\nlines"\n1.2_C2,1.2,C2,\n1.2_C9,1.2,C9,\n'
    )
    with pytest.raises(TableError, match="line 5: prediction_type: 'C9'"):
        read_test(tmp_path / "t.csv")


@pytest.mark.parametrize("uid", ["1.2.3", "0", "1." * 31 + "12", "1.2.826.0.1.3680043.5876"])
def test_uids(uid):
    assert validate_uid(uid) == uid


@pytest.mark.parametrize("uid", ["", ".", "..", "1..2", ".1", "1.", "1 2", "1.2/../3", "C:1", "1.2\x00", "1\n", "1" * 65, "1.2-3",
                                 "/etc/passwd", "/1.2", "1.2/", "..\\1", "1.2\\3", "٣.٤", "１.２", "1.²", "\ufeff1.2", "1.2\u200b", "-1", "~", b"1.2", 12])
def test_no_uids(uid):
    with pytest.raises(TableError):
        validate_uid(uid)


@pytest.mark.parametrize("uid", ["..", "../1.2", "/etc", "1.2/..", "1.2\x00", "٣.٤", "C:", "."])
@pytest.mark.parametrize("read, table", [
    (read_train, "StudyInstanceUID,patient_overall,C1,C2,C3,C4,C5,C6,C7\n{},0,0,0,0,0,0,0,0\n"),
    (read_test, "row_id,StudyInstanceUID,prediction_type\n{0}_C1,{0},C1\n"),
    (read_boxes, "StudyInstanceUID,x,y,width,height,slice_number\n{},1,1,1,1,1\n"),
    (read_folds, "StudyInstanceUID,fold\n{},0\n"),
])
def test_no_table_lets_a_path_through_as_a_uid(tmp_path, read, table, uid):
    (tmp_path / "t.csv").write_text(table.format("1.2"))
    assert len(read(tmp_path / "t.csv")) == 1
    (tmp_path / "t.csv").write_text(table.format(uid), encoding="utf-8")
    with pytest.raises(TableError, match="line 2: StudyInstanceUID: .* is not a StudyInstanceUID"):
        read(tmp_path / "t.csv")


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


def test_nifti_files_side_by_side_are_studies(tmp_path):
    for name in ("b.nii", "a.nii.gz", "notes.txt", ".c.nii", "1.2.3"):
        (tmp_path / name).mkdir() if name == "1.2.3" else (tmp_path / name).touch()
    found = find_studies(tmp_path, "test")
    assert {u: p.name for u, p in found.items()} == {"1.2.3": "1.2.3", "a": "a.nii.gz", "b": "b.nii"}
    assert list(test_rows(tmp_path)["row_id"][:9]) == [*(f"1.2.3_{t}" for t in TARGETS), "a_C1"]
    (tmp_path / "a.NII").touch()
    with pytest.raises(TableError, match="holds the study a twice, as a.NII and a.nii.gz: remove one"):
        find_studies(tmp_path, "test")


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


@pytest.mark.parametrize("n, k", [(2019, 5), (500, 5), (87, 5), (2019, 10), (60, 2), (10, 5), (5, 5)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_folds_are_whole_and_alike_in_all_eight_labels(n, k, seed):
    df = labels_table(n, seed)
    f = folds(df, k, seed)
    assert f.index.is_unique and f.index.tolist() == sorted(df.index) and set(f) == set(range(k))
    size, count = f.value_counts(), df.groupby(f).sum()
    assert size.max() - size.min() <= 1
    apart = count.max() - count.min()
    assert (apart[list(LEVELS)] <= 1).all() and apart["patient_overall"] <= 3, apart
    if n > 400 and k == 5:   # as shares: within one percentage point of the whole
        assert ((df.groupby(f).mean() - df.mean()).abs() < 0.01).all(axis=None)


def test_folds_of_labels_that_do_not_depend_on_each_other():
    """No table is promised to have a fracture in every patient who is said to have one."""
    df = labels_table(2019)
    df["patient_overall"] = np.random.default_rng(0).integers(0, 2, len(df))
    count = df.groupby(folds(df)).sum()
    assert (count.max() - count.min() <= 2).all(), count


# 24 studies, those with a fracture by the numbers of their vertebrae; the folds were computed once and must never change
FRACTURED = {1: "2", 2: "", 3: "7", 4: "67", 5: "", 6: "1", 7: "", 8: "12", 9: "5", 10: "567", 11: "", 12: "7", 13: "", 14: "4", 15: "3",
             16: "", 17: "2", 18: "6", 19: "", 20: "7", 21: "", 22: "27", 23: "", 24: "1"}
PINNED = {0: "104320143241310024322031", 1: "132321243211010024343040"}


def fixed_table():
    df = pd.DataFrame([[int(c[1] in v) for c in LEVELS] for v in FRACTURED.values()], columns=list(LEVELS),
                      index=[f"1.2.840.{i}" for i in FRACTURED])
    return df.assign(patient_overall=df.max(axis=1)).rename_axis("StudyInstanceUID")


def test_folds_never_change(tmp_path):
    df = fixed_table()
    for seed, expected in PINNED.items():
        f = folds(df, seed=seed)
        assert "".join(str(f[u]) for u in df.index) == expected
        for order in range(3):
            pd.testing.assert_series_equal(folds(df.sample(frac=1, random_state=order)[list(reversed(df.columns))], seed=seed), f)
        pd.testing.assert_series_equal(folds(df.astype(float), seed=seed), f)
        pd.testing.assert_series_equal(read_folds(write_folds(f, tmp_path / "folds.csv")), f)
    df.to_csv(tmp_path / "train.csv")
    code = f"from cspine.rsna import *; print(*folds(read_train({str(tmp_path / 'train.csv')!r})).sort_index(), sep='')"
    for hash_seed in "0", "1", "4242":
        env = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": hash_seed}
        out = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True).stdout
        assert out.strip() == "".join(map(str, folds(df)))


def test_the_papers_80_20():
    df = labels_table(2019)
    train, held_out = split_80_20(df)
    assert sorted(train + held_out) == sorted(df.index) and not set(train) & set(held_out)
    assert len(held_out) in (403, 404) and train == sorted(train) and held_out == sorted(held_out)
    assert held_out == folds(df).pipe(lambda f: f[f == 0]).index.tolist()
    assert ((df.loc[held_out].mean() - df.loc[train].mean()).abs() < 0.01).all()
    assert split_80_20(df.sample(frac=1, random_state=0)) == (train, held_out) != split_80_20(df, seed=1)
    assert split_80_20(fixed_table())[1] == [f"1.2.840.{i}" for i in (15, 16, 2, 22, 6)]


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
    d = _per_exam(y, y * 0.0 + best_constant(y)) - _per_exam(y, sub.assign(u=sub.row_id.str.split("_", n=1).str[0], t=sub.row_id.str.split("_", n=1).str[1]).pivot(index="u", columns="t", values="fractured"))
    assert s["better_high"] - s["better_low"] == pytest.approx(2 * 1.96 * d.std() / len(y)**.5, rel=0.1)
    assert s["better"] == pytest.approx(s["best_constant"] - s["score"]) and 0 < s["better_low"] < s["better"] < s["better_high"]
    assert s["table"].index.tolist() == list(TARGETS) and (s["table"]["auroc"].dropna() == 1).all()
    assert best_constant(y)["C2"] == pytest.approx(2 * y["C2"].mean() / (1 + y["C2"].mean()))
    assert metric(y, y * 0.0) > 5  # certain and wrong costs a lot, but a number


def test_the_interval_over_studies_narrows_with_their_number_and_needs_two(tmp_path):
    def width(n):
        y = labels_table(n)
        y.to_csv(tmp_path / "truth.csv")
        rng = np.random.default_rng(1)
        rows = [(f"{u}_{t}", rng.uniform(0.05, 0.3)) for u in y.index for t in TARGETS]
        s = score(tmp_path / "truth.csv", write_submission(pd.DataFrame(rows, columns=["row_id", "fractured"]), tmp_path / "s.csv"))
        return s["better_high"] - s["better_low"]
    assert 3 < width(40) / width(1000) < 8     # the root of 25
    assert np.isnan(width(1))


def test_better_than_the_constant_is_said_to_be_chance_when_it_is(tmp_path):
    "The best constant was fitted to the truth that it is scored by: nobody who does not look is better beyond chance, and worse is no verdict"
    def said(n, look, seed):
        y = labels_table(n, seed)
        y.to_csv(tmp_path / "truth.csv")
        blind = best_constant(labels_table(5000, 99))
        rows = [(f"{u}_{t}", np.clip(blind[t] + look * (y.loc[u, t] - blind[t]), 0.01, 0.99)) for u in y.index for t in TARGETS]
        return versus_constant(score(tmp_path / "truth.csv", write_submission(pd.DataFrame(rows, columns=["row_id", "fractured"]), tmp_path / "s.csv")))
    for seed in range(5):
        assert "which was fitted to these very answers" in said(40, 0, seed) or "may be chance" in said(40, 0, seed)
        assert "better" in said(40, 0.5, seed) and "chance" not in said(40, 0.5, seed) and "over 40 studies" in said(40, 0.5, seed)
    assert any("may be chance" in said(16, 0.05, seed) for seed in range(10)) and any("fitted" in said(16, 0, seed) for seed in range(10))
    assert all("fitted" in said(1, 0.9, seed) for seed in range(5))     # of one study the constant knows all


def test_the_metric_is_sklearns_log_loss_with_weights():
    rng = np.random.default_rng(0)
    y = labels_table(300)
    p = pd.DataFrame(rng.uniform(0.001, 0.999, y.shape), index=y.index, columns=y.columns)
    w = (1 + y) * ([1] * 7 + [7])
    w = w.div(w.sum(axis=1), axis=0)
    expected = log_loss(y.to_numpy().ravel(), p.to_numpy().ravel(), sample_weight=w.to_numpy().ravel())
    assert metric(y, p) == pytest.approx(expected, rel=1e-12)
    assert metric(y[y.columns[::-1]], p.sample(frac=1, random_state=0)) == pytest.approx(expected, rel=1e-12)   # by name


@pytest.mark.parametrize("target", TARGETS)
def test_no_constant_is_better_for_a_row(target):
    y = labels_table(1000)[target]
    found = minimize_scalar(lambda p: log_loss(y, np.full(len(y), p), sample_weight=1 + y), bounds=(1e-3, 1 - 1e-3),
                            method="bounded", options={"xatol": 1e-7}).x
    assert best_constant(labels_table(1000))[target] == pytest.approx(found, abs=1e-5)


def test_scoring_a_short_file_takes_no_time(tmp_path):
    y = labels_table(2019)
    y.to_csv(tmp_path / "truth.csv")
    rows = [f"{u}_{t}" for u in y.index for t in TARGETS]
    write_submission(pd.DataFrame({"row_id": rows[:-2], "fractured": 0.5}), tmp_path / "s.csv")
    start = time.perf_counter()
    with pytest.raises(TableError, match=f"lacks {re.escape(rows[-2])} and 1 more rows"):
        score(tmp_path / "truth.csv", tmp_path / "s.csv")
    assert time.perf_counter() - start < 20


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


def full(*args, **kw): raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    df = pd.DataFrame({"row_id": ["1.2_C1"], "fractured": [0.5]})
    write_submission(df, tmp_path / "s.csv")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_submission(df.assign(row_id="1.2.3_C1", fractured=0.1), tmp_path / "s.csv")
    assert read_submission(tmp_path / "s.csv")["fractured"].tolist() == [0.5]
    assert [p.name for p in tmp_path.iterdir()] == ["s.csv"]


def test_a_full_disk_has_room_for_the_same_rows(tmp_path, monkeypatch):
    df = pd.DataFrame({"row_id": ["1.2_C1", "1.2_C2"], "fractured": [0.5, 1]})
    write_submission(df, tmp_path / "s.csv")
    at = (tmp_path / "s.csv").stat().st_ino
    monkeypatch.setattr("tempfile.mkstemp", full)
    write_submission(df.assign(fractured=[1/3, 0]), tmp_path / "s.csv")
    assert (tmp_path / "s.csv").stat().st_ino == at
    assert np.allclose(read_submission(tmp_path / "s.csv")["fractured"], [1/3, 0], atol=1e-12)


def test_bad_rows_are_kept_where_they_are_asked_for(tmp_path):
    (tmp_path / "test_images" / "1.2").mkdir(parents=True)
    lines = ["row_id,StudyInstanceUID,prediction_type", "1.2_C1,1.2,C1", "../x_C1,../x,C1", "1.2_C9,1.2,C9", "other,1.2,C2", "1.2_C1,1.2,C1", "short"]
    (tmp_path / "test.csv").write_text("\n".join(lines))
    bad = {}
    rows = test_rows(tmp_path, bad)
    assert rows["row_id"].tolist() == ["1.2_C1", "../x_C1", "1.2_C9", "other", "short"]
    for row, says in {"../x_C1": "line 3: StudyInstanceUID: '../x' is not", "1.2_C9": "line 4: prediction_type: 'C9' is none of", "other": "line 5: row_id other should be 1.2_C2",
                      "1.2_C1": "line 6: 1.2_C1 is already on line 2", "short": "line 7: 1 values, but the header names 3"}.items():
        assert bad[row].startswith(says), bad


@pytest.mark.parametrize("spoilt", [b'"1.2_C2,1.2,C2', b'1.2_C2,"1.2"x,C2', "1.2_C2,1.2,C\xfc".encode("latin-1")])
def test_a_stray_quote_or_letter_costs_its_row_at_most(tmp_path, spoilt):
    (tmp_path / "test.csv").write_bytes(b"\n".join([b"row_id,StudyInstanceUID,prediction_type", b'"1.2_C1","1.2","C1"', spoilt, b"1.2_C3,1.2,C3"]))
    with pytest.raises(TableError):
        test_rows(tmp_path)
    bad = {}
    rows = test_rows(tmp_path, bad)
    assert rows["row_id"].tolist() == ["1.2_C1", "1.2_C2", "1.2_C3"] and set(bad) <= {"1.2_C2"}
    assert rows["StudyInstanceUID"].tolist()[::2] == ["1.2", "1.2"]


def test_of_a_study_that_is_there_twice_the_folder_is_answered(tmp_path):
    (tmp_path / "test_images" / "1.2").mkdir(parents=True)
    (tmp_path / "test_images" / "1.2.nii").touch()
    with pytest.raises(TableError, match="1.2 twice"):
        find_studies(tmp_path, "test")
    twice = {}
    assert find_studies(tmp_path, "test", twice) == {"1.2": tmp_path / "test_images" / "1.2"}
    assert twice == {"1.2": "it is there twice: 1.2 is answered, not 1.2.nii"}


def test_importing_tables_does_not_load_torch():
    code = "import cspine.rsna, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
