"""Label maps as other programs find them: SimpleITK, dcm2niix and pydicom lay them over the series, voxel by voxel."""
import subprocess
import warnings
from types import SimpleNamespace

import dcm2niix
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread
from scenes import EVEN, KINDS, acquire, said

from cspine import cli
from cspine.dicom import read_series, write_series
from cspine.labelmaps import LabelMapError, check_labels_path, labels_file, write_labels, write_study_labels
from cspine.oddities import ODDITIES, write_enhanced, write_odd
from cspine.rsna import read_mask

sitk.ProcessObject.SetGlobalWarningDisplay(False)
RAS = np.diag([-1., -1, 1, 1])
STRAIGHT = [k for k, (_, error, _) in KINDS.items() if error < 1 and k not in ('gap', 'touching')]
TILTED = ['tilted', 'tilted_back', 'tilted_and_turned', 'tilted_prone', 'tilted_feet_first', 'one_digit_tilted']
UNEVEN = ['head', 'head_tilted', 'touching', 'touching_tilted', 'jittered', 'gap', 'out_of_line']


def bins(hu):
    "Labels that follow from the scan itself, so that another reader's scan says what they should be: 0 to 8."
    return np.digitize(hu, np.linspace(-500, 700, 8)).astype('u1')


def blocks(volume):
    "Labels that follow from the millimetres: boxes of 5 x 6 x 7 mm, 0 to 8."
    mm = np.moveaxis(np.indices(volume.shape), 0, -1) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return (np.floor(mm/(5, 6, 7) + .137) @ (1, 3, 5) % 9).astype('u1')


def nearest(labels, volume, mm):
    "Of each place (..., 3) in LPS mm the label of the nearest voxel; -1 where the volume does not reach."
    inverse = np.linalg.inv(volume.affine)
    index = np.rint(mm @ inverse[:3, :3].T + inverse[:3, 3]).astype(int)
    inside = ((index >= 0) & (index < volume.shape)).all(-1)
    return np.where(inside, labels[tuple(np.moveaxis(index*inside[..., None], -1, 0))].astype(int), -1)


def places(ds):
    "(rows, columns, 3) LPS mm of a slice's pixels, by its own header."
    row, column = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
    y, x = np.mgrid[:ds.Rows, :ds.Columns]
    return np.array(ds.ImagePositionPatient, float) + y[..., None]*ds.PixelSpacing[0]*column + x[..., None]*ds.PixelSpacing[1]*row


def voxels(img):
    "(i, j, k, 3) LPS mm of a NIfTI file's voxels, by its sform."
    affine = RAS @ img.affine
    return np.moveaxis(np.indices(img.shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def hu_of(ds): return ds.pixel_array*float(ds.RescaleSlope) + float(ds.RescaleIntercept)


def slices(folder): return [dcmread(p) for p in sorted(folder.rglob('*.dcm'))]


def by_simpleitk(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def same_grid(a, b, mm=2e-3):
    assert a.GetSize() == b.GetSize()
    for of in (sitk.Image.GetSpacing, sitk.Image.GetOrigin, sitk.Image.GetDirection):
        assert np.allclose(of(a), of(b), rtol=0, atol=mm), (of(a), of(b))


def by_dcm2niix(folder, out):
    "As it stacks the files, before it mends tilt and spacing."
    out.mkdir()
    subprocess.run([dcm2niix.bin, '-o', out, '-b', 'n', '-f', 'a', folder], check=True, capture_output=True)
    return nib.load(out/'a.nii')


def frames_of(path):
    "What pydicom finds in a segmentation: SOPInstanceUID -> (rows, columns) labels; each frame lies where it says it does."
    seg, found = dcmread(path), {}
    assert seg.SegmentationType == 'BINARY' and [s.SegmentNumber for s in seg.SegmentSequence] == list(range(1, 9))
    shared = seg.SharedFunctionalGroupsSequence[0]
    masks = seg.pixel_array.reshape(seg.NumberOfFrames, seg.Rows, seg.Columns)
    for mask, groups in zip(masks, seg.PerFrameFunctionalGroupsSequence, strict=True):
        uid = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        labels, at = found.setdefault(uid, (np.zeros(mask.shape, 'u1'), position))
        assert (at == position).all() and not labels[mask > 0].any()
        labels[mask > 0] = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    geometry = [float(v) for v in (*shared.PlaneOrientationSequence[0].ImageOrientationPatient, *shared.PixelMeasuresSequence[0].PixelSpacing)]
    return found, geometry


def check_segmentation(path, sources, wanted, share=1.):
    "Every slice's frames lie in its own plane and hold what `wanted(ds)` says, -1 where it does not say."
    (found, geometry), right, asked = frames_of(path), 0, 0
    for ds in sources:
        labels, at = found.pop(ds.SOPInstanceUID, (np.zeros((ds.Rows, ds.Columns)), None))
        if at is not None:
            assert np.allclose(at, np.array(ds.ImagePositionPatient, float), rtol=0, atol=1e-6)
            assert np.allclose(geometry, [float(v) for v in (*ds.ImageOrientationPatient, *ds.PixelSpacing)], rtol=0, atol=1e-6)
        want = wanted(ds)
        right, asked = right + (labels == want).sum(), asked + (want >= 0).sum()
    assert not found and asked and right >= share*asked, (right, asked, list(found))


@pytest.mark.parametrize('kind', STRAIGHT)
def test_nifti_lies_on_the_series_as_others_read_it(tmp_path, kind):
    names = np.random.default_rng(5).permutation(len(KINDS[kind][0]['heights']))
    (folder := tmp_path/'study').mkdir()
    volume = read_series(acquire(folder, **KINDS[kind][0], names=names))
    assert write_labels(tmp_path/'l.nii.gz', bins(volume.hu), volume, folder) == []
    scan, labels = by_simpleitk(folder), sitk.ReadImage(str(tmp_path/'l.nii.gz'))
    same_grid(scan, labels)
    got = sitk.GetArrayFromImage(labels)
    assert (got == bins(sitk.GetArrayFromImage(scan))).all() and len(np.unique(got)) >= 8
    other = by_dcm2niix(folder, tmp_path/'other')          # the rows the other way round, as NIfTI likes them
    labels = nib.load(tmp_path/'l.nii.gz')
    index = nib.affines.apply_affine(np.linalg.inv(RAS @ other.affine), voxels(labels))
    at = tuple(np.moveaxis(np.rint(index).astype(int), -1, 0))
    assert np.abs(index - np.rint(index)).max() < .01 and min(map(np.min, at)) == 0
    assert (bins(np.asarray(other.dataobj)[at]) == np.asarray(labels.dataobj)).all()
    assert (read_mask(tmp_path/'l.nii.gz', volume) == bins(volume.hu)).all()       # and back


@pytest.mark.parametrize('kind', TILTED)
def test_nifti_of_a_tilted_series_lies_on_its_slices(tmp_path, kind):
    (folder := tmp_path/'study').mkdir()
    volume = read_series(acquire(folder, **KINDS[kind][0]))
    labels = blocks(volume)
    assert 'sheared' in write_labels(tmp_path/'l.nii.gz', labels, volume, folder)[0]
    img, sources = nib.load(tmp_path/'l.nii.gz'), slices(folder)
    data, at, tenths = np.asarray(img.dataobj), voxels(img), kind.startswith('one_digit')
    assert img.shape[2] == len(sources)
    for ds in sources:
        mm = places(ds)
        k = np.linalg.norm(at[0, 0] - mm[0, 0], axis=-1).argmin()
        assert np.abs(at[:, :, k].transpose(1, 0, 2) - mm).max() < (.1 if tenths else .02)   # the sform is where the pixels are
        want = nearest(labels, volume, mm)
        assert (data[:, :, k].T == want)[want >= 0].mean() > (.9 if tenths else .995)         # but for halves of a voxel
    # SimpleITK stacks series and label map alike: as if they were straight (dcm2niix is no judge of tilt: scripts/second_opinions.py)
    same_grid(by_simpleitk(folder), sitk.ReadImage(str(tmp_path/'l.nii.gz')), .1 if tenths else .02)
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/'l.nii.gz'))) == data.T).all()
    assert read_mask(tmp_path/'l.nii.gz', volume).shape == volume.shape


@pytest.mark.parametrize('kind', UNEVEN)
def test_nifti_of_an_uneven_series_lies_on_the_evened_grid_and_says_so(tmp_path, kind):
    (folder := tmp_path/'study').mkdir()
    volume = read_series(acquire(folder, **KINDS[kind][0]))
    labels = blocks(volume)
    note, = write_labels(tmp_path/'l.nii', labels, volume, folder)
    assert f'the {len(slices(folder))} slices are not evenly stacked' in note
    img = sitk.ReadImage(str(tmp_path/'l.nii'))
    got, axes = sitk.GetArrayFromImage(img), np.array(img.GetDirection()).reshape(3, 3)*img.GetSpacing()
    mm = np.moveaxis(np.indices(got.shape)[::-1], 0, -1) @ axes.T + img.GetOrigin()
    assert got.size == labels.size and (got == nearest(labels, volume, mm)).all()
    row, column = np.array(slices(folder)[0].ImageOrientationPatient, float).reshape(2, 3)   # in the order of acquisition
    assert np.allclose(axes[:, 0]/img.GetSpacing()[0], row, atol=1e-4) and np.allclose(axes[:, 1]/img.GetSpacing()[1], column, atol=1e-4)
    if kind in ('gap', 'touching'):                       # every slice lies on the evened grid, where its header says
        write_labels(tmp_path/'l.nii', bins(volume.hu), volume)
        got = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/'l.nii')))
        for ds in slices(folder):
            index = np.rint((places(ds) - img.GetOrigin()) @ np.linalg.inv(axes).T).astype(int)
            assert (got[tuple(np.moveaxis(index[..., ::-1], -1, 0))] == bins(hu_of(ds))).all()


@pytest.mark.parametrize('kind', KINDS)
def test_segmentation_lies_in_the_plane_of_each_slice(tmp_path, kind):
    (folder := tmp_path/'study').mkdir()
    volume = read_series(acquire(folder, **KINDS[kind][0]))
    exact = kind in (*STRAIGHT, 'gap', 'touching')        # not one voxel wrong; else but for halves of a voxel
    labels = bins(volume.hu) if exact else blocks(volume)
    assert write_labels(tmp_path/'l.dcm', labels, volume, folder, 'a bundle') == []
    if exact: check_segmentation(tmp_path/'l.dcm', slices(folder), lambda ds: bins(hu_of(ds)))
    else: check_segmentation(tmp_path/'l.dcm', slices(folder), lambda ds: nearest(labels, volume, places(ds)), .9 if kind.startswith('one_digit') else .995)


@pytest.mark.parametrize('kind', ['straight', 'feet_first', 'sagittal', 'tilted'])
def test_simpleitk_reads_the_segmentation_too(tmp_path, kind, monkeypatch):
    monkeypatch.setattr('scenes.COLUMNS', 56)   # of other widths than a multiple of 8 ITK shuffles the bits (ITK #6639)
    (folder := tmp_path/'study').mkdir()
    volume = read_series(acquire(folder, **KINDS[kind][0]))
    write_labels(tmp_path/'l.dcm', bins(volume.hu), volume, folder)
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/'l.dcm'))) > 0
    assert (frames == (dcmread(tmp_path/'l.dcm').pixel_array > 0)).all()
    # it knows one segment per file: of one, the voxels lie where the series has them
    labels = bins(volume.hu)
    labels[labels != 4] = 0
    write_labels(tmp_path/'l.dcm', labels, volume, folder)
    got = sitk.ReadImage(str(tmp_path/'l.dcm'))
    assert got.GetDepth() == len(EVEN)
    there = set()
    for ds in slices(folder): there |= {tuple(p) for p in np.round(places(ds)[bins(hu_of(ds)) == 4], 1)}
    k, j, i = np.nonzero(sitk.GetArrayFromImage(got))
    axes = np.array(got.GetDirection()).reshape(3, 3)
    if kind == 'tilted':                       # it stacks frames as if they were straight: the first one tells
        i, j, k = i[k == 0], j[k == 0], k[k == 0]
        mm = np.c_[i, j, k]*got.GetSpacing() @ axes.T + got.GetOrigin()
        found = nearest(labels, volume, mm)
        assert (found == 4)[found >= 0].mean() > .9
    else:
        mm = np.c_[i, j, k]*got.GetSpacing() @ axes.T + got.GetOrigin()
        assert {tuple(p) for p in np.round(mm, 1)} == there and len(there) > 1000


def test_segmentation_says_what_it_is(tmp_path):
    (folder := tmp_path/'study').mkdir()
    volume = read_series(acquire(folder, EVEN))
    write_labels(tmp_path/'l.dcm', bins(volume.hu), volume, folder, 'bundle \\ Nr. 1 ü')
    seg = dcmread(tmp_path/'l.dcm')
    assert seg.SOPClassUID == '1.2.840.10008.5.1.4.1.1.66.4' and seg.StudyInstanceUID == '1.2.3' == volume.uid
    assert 'not for clinical use' in seg.ContentDescription and 'not for clinical use' in seg.SeriesDescription
    first = slices(folder)[0]
    assert seg.FrameOfReferenceUID == first.FrameOfReferenceUID and seg.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID
    assert seg.SeriesInstanceUID != first.SeriesInstanceUID
    from cspine import __version__
    from pydicom.sr.codedict import codes
    for s, level in zip(seg.SegmentSequence, ['C1', 'C2', 'C3', 'C4', 'C5', 'C6', 'C7', 'T1-T12']):
        code, by = s.SegmentedPropertyTypeCodeSequence[0], s.SegmentationAlgorithmIdentificationSequence[0]
        known = codes.cid7151.ThoracicSpine if level[0] == 'T' else getattr(codes.cid7151, f'{level}Vertebra')
        assert (code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning) == (known.value, 'SCT', known.meaning) and s.SegmentLabel == level
        assert s.SegmentAlgorithmType == 'AUTOMATIC' and (by.AlgorithmName, by.AlgorithmVersion) == ('bundle   Nr. 1', __version__)


@pytest.mark.parametrize('syntax', ['jpeg_lossless', 'jpegls', 'rle', 'deflated', 'implicit'])
def test_compressed_series(tmp_path, syntax):
    hu = np.random.default_rng(0).integers(-900, 900, (6, 24, 32)).astype('i2')
    folder = write_series(hu, np.diag([-1.5, .6, .6, 1])[:, [2, 1, 0, 3]], tmp_path/'study', syntax=syntax)
    volume = read_series(folder)
    for name in ('l.nii.gz', 'l.dcm'): assert write_labels(tmp_path/name, bins(volume.hu), volume, folder) == []
    check_segmentation(tmp_path/'l.dcm', slices(folder), lambda ds: bins(hu[ds.InstanceNumber - 1]))
    got, scan = sitk.ReadImage(str(tmp_path/'l.nii.gz')), by_simpleitk(folder)
    same_grid(got, scan)
    assert (sitk.GetArrayFromImage(got) == bins(sitk.GetArrayFromImage(scan))).all()


def test_a_folder_with_more_than_the_series(tmp_path):
    "The same file names in two folders, a slice twice, slices of another size, another series: only the picked ones are referred to."
    folder = tmp_path/'study'
    for part, heights in (('a', EVEN[:18]), ('b', EVEN[18:])):
        (folder/part).mkdir(parents=True)
        acquire(folder/part, heights)
        for path in (folder/part).glob('*.dcm'):
            ds = dcmread(path)
            ds.SOPInstanceUID = f'1.2.4.{ord(part)}.{ds.InstanceNumber}'
            ds.save_as(path)
    picked = slices(folder)
    twice = dcmread(folder/'a'/'3.dcm')
    twice.SOPInstanceUID, twice.AcquisitionNumber = '1.2.5', 2
    twice.save_as(folder/'c.dcm')
    write_series(np.zeros((5, 20, 20)), np.diag([-1., 1, 1, 1])[:, [2, 1, 0, 3]], folder/'small', uid='1.2.3')
    volume = read_series(folder)
    assert len(said(volume)) == 2 and len(volume.acquired.files) == 30, volume.notes
    write_labels(tmp_path/'l.dcm', bins(volume.hu), volume, folder)
    check_segmentation(tmp_path/'l.dcm', picked, lambda ds: bins(hu_of(ds)))
    assert len(dcmread(tmp_path/'l.dcm').ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 30
    assert write_labels(tmp_path/'l.nii.gz', bins(volume.hu), volume, folder) == []
    got = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/'l.nii.gz')))
    assert (got == bins(np.stack([hu_of(ds) for ds in sorted(picked, key=lambda ds: ds.ImagePositionPatient[2])]))).all()


@pytest.mark.parametrize('one', ['folder', 'file'])
def test_a_single_slice(tmp_path, one):
    folder = write_series(np.random.default_rng(0).integers(-900, 900, (1, 16, 24)), np.diag([-1.5, .6, .6, 1])[:, [2, 1, 0, 3]], tmp_path/'study')
    study = folder if one == 'folder' else folder/'1.dcm'
    volume = read_series(study)
    for name in ('l.nii.gz', 'l.dcm'): assert write_labels(tmp_path/name, bins(volume.hu), volume, study) == []
    check_segmentation(tmp_path/'l.dcm', slices(folder), lambda ds: bins(hu_of(ds)))
    assert (read_mask(tmp_path/'l.nii.gz', volume) == bins(volume.hu)).all()


def test_no_vertebra_at_all(tmp_path):
    (folder := tmp_path/'study').mkdir()
    volume = read_series(acquire(folder, EVEN))
    nothing = np.zeros(volume.shape, 'u1')
    assert write_labels(tmp_path/'l.nii.gz', nothing, volume, folder) == []
    same_grid(sitk.ReadImage(str(tmp_path/'l.nii.gz')), by_simpleitk(folder))
    assert not sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/'l.nii.gz'))).any()
    note, = write_labels(tmp_path/'l.dcm', nothing, volume, folder)
    seg = dcmread(tmp_path/'l.dcm')
    assert 'one empty frame' in note and seg.NumberOfFrames == 1 and not seg.pixel_array.any() and len(seg.SegmentSequence) == 8


def change(folder, **values):
    "Other values for elements of every slice; None takes them away."
    for n, path in enumerate(sorted(folder.glob('*.dcm'))):
        ds = dcmread(path)
        for name, value in values.items():
            if value is None: ds.pop(name, None)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter('ignore')
                    setattr(ds, name, value(n) if callable(value) else value)
        ds.save_as(path)
    return folder


@pytest.fixture
def study(tmp_path): return write_series(np.random.default_rng(0).integers(-900, 900, (4, 16, 24)), np.diag([-1.5, .6, .6, 1])[:, [2, 1, 0, 3]], tmp_path/'study')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('odd', [
    dict.fromkeys('PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber FrameOfReferenceUID SliceThickness Modality'.split()),
    dict(PatientBirthDate='yesterday', StudyDate='20269999', StudyTime='noon', PatientSex='not said in so many words', StudyID='x'*99, SliceThickness=0),
    dict(PatientName='Yamada^Tarou=山田^太郎', SpecificCharacterSet='ISO_IR 192', PatientID=['a', 'b']),
    dict(PatientName='Muller', SpecificCharacterSet='NONSENSE', LossyImageCompression='01', LossyImageCompressionRatio=[10, 2], LossyImageCompressionMethod=['ISO_10918_1', 'ISO_14495_1']),
], ids=['missing', 'not DICOM', 'names', 'lossy'])
def test_headers_from_outside(tmp_path, study, odd):
    volume = read_series(change(study, **odd))
    assert write_labels(tmp_path/'l.dcm', bins(volume.hu), volume, study) == []
    check_segmentation(tmp_path/'l.dcm', slices(study), lambda ds: bins(hu_of(ds)))
    seg = dcmread(tmp_path/'l.dcm')
    assert len(seg.FrameOfReferenceUID) > 9 and 'PatientID' in seg and seg.StudyDate == '' and seg.StudyID == ''
    if 'ISO_IR 192' in odd.values(): assert seg.PatientName == odd['PatientName']
    if 'LossyImageCompression' in odd: assert seg.LossyImageCompressionRatio == [10, 2]


@pytest.mark.parametrize('odd, words', [
    (dict(SOPInstanceUID=None), 'has no valid SOPInstanceUID'), (dict(StudyInstanceUID=None), 'has no valid StudyInstanceUID'),
    (dict(SOPInstanceUID='../../etc'), 'has no valid SOPInstanceUID'), (dict(SOPInstanceUID='1.2.3'), 'share one SOPInstanceUID'),
    (dict(SeriesInstanceUID=lambda n: f'1.2.{n}'), 'name more than one series'), (dict(ImagePositionPatient=None), 'does not say where it lies'),
    (dict(ImagePositionPatient=[1, 2, 3]), 'share one position')])
@pytest.mark.filterwarnings('ignore')
def test_what_no_segmentation_can_refer_to(tmp_path, study, odd, words):
    volume = read_series(change(study, **odd))
    with pytest.raises(LabelMapError, match=f'{words}.*write .nii.gz'): write_labels(tmp_path/'l.dcm', bins(volume.hu), volume, study)
    assert not (tmp_path/'l.dcm').exists()
    write_labels(tmp_path/'l.nii.gz', bins(volume.hu), volume, study)


def test_a_multi_frame_file_gets_a_nifti_only(tmp_path, study):
    hu = read_series(study).hu
    write_enhanced(study)
    volume = read_series(study)
    with pytest.raises(LabelMapError, match='enhanced multi-frame.*write .nii.gz'): write_labels(tmp_path/'l.dcm', bins(hu), volume, study)
    write_labels(tmp_path/'l.nii.gz', bins(hu), volume, study)
    assert (read_mask(tmp_path/'l.nii.gz', volume) == bins(hu)).all()


@pytest.mark.parametrize('oddity', ODDITIES)
def test_every_odd_folder_gets_its_label_map(tmp_path, oddity):
    "As NIfTI, and as DICOM unless a sentence says why not."
    z, y, x = np.mgrid[:40, :32, :48]
    hu = (300*np.sin(x/5) + 300*np.cos(y/4) + 200*np.sin(z/6)).astype('i2')
    folder = write_odd(hu, np.array([(0, 0, .5, 1), (0, .5, 0, 2), (-1., 0, 0, 3), (0, 0, 0, 1)]), tmp_path/'study', oddity)
    volume = read_series(folder)
    notes = write_labels(tmp_path/'l.nii.gz', bins(volume.hu), volume, folder)
    got = read_mask(tmp_path/'l.nii.gz', volume)
    assert (got == bins(volume.hu)).mean() > (.85 if notes and 'tilted' in notes[0] else .9999)
    try: write_labels(tmp_path/'l.dcm', bins(volume.hu), volume, folder)
    except LabelMapError as e: assert str(e).endswith('write .nii.gz.')
    else: assert len(frames_of(tmp_path/'l.dcm')[0]) == len(volume.acquired.files)


def test_a_study_that_changed_meanwhile(tmp_path, study):
    volume = read_series(study)
    (study/'2.dcm').unlink()
    with pytest.raises(LabelMapError, match='2.dcm cannot be read any more'): write_labels(tmp_path/'l.dcm', bins(volume.hu), volume, study)


@pytest.mark.parametrize('axes', ['RAS', 'LPI', 'PSR', 'AIL'])
def test_a_scan_in_nifti_gets_its_label_map_on_its_own_axes(tmp_path, axes):
    scan = nib.Nifti1Image(np.random.default_rng(1).integers(-900, 900, (9, 7, 5)).astype('i2'), np.array([(.4, .36, 0, -3), (-.3, .48, 0, 4), (0, 0, 2, 5), (0, 0, 0, 1.)]))
    scan = scan.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(scan.affine), nib.orientations.axcodes2ornt(axes)))
    if axes == 'LPI': scan.set_sform(None, 0); scan.set_qform(scan.affine, 1)   # one of the two says where it lies
    scan.to_filename(tmp_path/'scan.nii.gz')
    volume = read_series(tmp_path/'scan.nii.gz')
    for study in (tmp_path/'scan.nii.gz', None):
        write_labels(tmp_path/'l.nii.gz', bins(volume.hu), volume, study)
        got = nib.load(tmp_path/'l.nii.gz')
        index = np.rint(nib.affines.apply_affine(np.linalg.inv(scan.affine) @ RAS, voxels(got))).astype(int)
        assert (np.asarray(got.dataobj) == bins(np.asarray(scan.dataobj)[tuple(np.moveaxis(index, -1, 0))])).all()
        if study is not None:
            same_grid(sitk.ReadImage(str(study)), sitk.ReadImage(str(tmp_path/'l.nii.gz')))
            assert all(got.header[k] == scan.header[k] for k in ('sform_code', 'qform_code'))
            assert (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path/'l.nii.gz'))) == bins(sitk.GetArrayFromImage(sitk.ReadImage(str(study))))).all()
        with pytest.raises(LabelMapError, match='no series of DICOM slices.*write .nii.gz'): write_labels(tmp_path/'l.dcm', bins(volume.hu), volume, study)
    scan.slicer[1:].to_filename(tmp_path/'scan.nii.gz')
    with pytest.raises(LabelMapError, match='is not the scan that was read'): write_labels(tmp_path/'l.nii.gz', bins(volume.hu), volume, tmp_path/'scan.nii.gz')
    (tmp_path/'scan.nii.gz').write_bytes(b'lost')
    with pytest.raises(LabelMapError, match='cannot be read any more'): write_labels(tmp_path/'l.nii.gz', bins(volume.hu), volume, tmp_path/'scan.nii.gz')


def test_where_a_label_map_can_be_written(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    (tmp_path/'d.nii').mkdir()
    for name, words in (('l.png', 'says no format'), ('l', 'says no format'), ('d.nii', 'is a folder'), ('file/l.nii', 'is a file')):
        with pytest.raises(LabelMapError, match=words): check_labels_path(tmp_path/name)
    assert check_labels_path(tmp_path/'new'/'l.NII.GZ') == tmp_path/'new'/'l.NII.GZ'
    monkeypatch.setattr('os.access', lambda *_: False)
    with pytest.raises(LabelMapError, match='may not be written to'): check_labels_path(tmp_path/'l.nii')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(LabelMapError, match=r"pip install 'cspine\[seg\]'"): check_labels_path(tmp_path/'l.dcm')


def test_wrong_label_maps(tmp_path, study):
    volume = read_series(study)
    for labels, words in ((np.zeros((3, 4, 5), 'u1'), 'same grid'), (np.full(volume.shape, 9, 'u1'), 'labels are 0 to 8'), (np.full(volume.shape, -1), 'labels are 0 to 8')):
        with pytest.raises(LabelMapError, match=words): write_labels(tmp_path/'l.nii.gz', labels, volume, study)
    assert not list(tmp_path.glob('*.nii*'))


def test_a_study_s_name_becomes_a_path_only_after_a_check(tmp_path, study):
    volume, folder = read_series(study), tmp_path/'maps'
    names = ['1.2.840', '../up', '..', '', '/etc/passwd', 'a b', 'a/b', 'a_b', 'x'*300, '1.2.840.' + '9'*70, 'ü', '\udc80', '.hidden', 'a\0b']
    files = [labels_file(folder, n) for n in names]
    assert len(set(files)) == len(names) and all(f.parent == folder and not f.name.startswith('.') and len(f.name) < 100 and f.name.isascii() for f in files)
    assert files[0].name == '1.2.840.nii.gz'
    assert [write_study_labels(folder, n, bins(volume.hu), volume, study) for n in names] == [(f, []) for f in files]
    assert sorted(folder.iterdir()) == sorted(files) and {p.name for p in tmp_path.iterdir()} == {'maps', 'study'}


def test_the_same_label_map_gives_the_same_bytes(tmp_path, study):
    volume = read_series(study)
    for name in ('a.nii.gz', 'b.nii.gz'): write_labels(tmp_path/name, bins(volume.hu), volume, study)
    assert (tmp_path/'a.nii.gz').read_bytes() == (tmp_path/'b.nii.gz').read_bytes()


def test_predict_writes_one(tmp_path, study, capsys, monkeypatch):
    volume = read_series(study)
    seen = SimpleNamespace(uid='1.2', probabilities={}, looked=[], notes=[], labels=bins(volume.hu))
    bundle = SimpleNamespace(card=dict(name='mine'), path=tmp_path)
    monkeypatch.setattr('cspine.inference.Pipeline', lambda *_, **__: SimpleNamespace(predict=lambda *_, **__: seen, bundle=bundle))
    def run(*args):
        with pytest.raises(SystemExit) as stop: cli.main(['predict', str(study), *map(str, args)])
        return stop.value.code or 0, capsys.readouterr()
    for name in ('l.nii.gz', 'l.dcm'):
        code, said = run('--labels', tmp_path/name)
        assert code == 0 and f'labels: {tmp_path/name}' in said.out and (tmp_path/name).exists(), said
    assert (read_mask(tmp_path/'l.nii.gz', volume) == bins(volume.hu)).all()
    assert dcmread(tmp_path/'l.dcm').SegmentSequence[0].SegmentAlgorithmName == 'mine'
    code, said = run('--labels', tmp_path/'l.png')
    assert code == 2 and 'says no format' in said.err and '1.2' not in said.out
