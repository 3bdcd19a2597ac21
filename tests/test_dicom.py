import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scenes import said
from pydicom.data import get_testdata_file

from cspine.ctfile import LOSSY, SYNTAXES
from cspine.dicom import (DamagedSeries, DicomError, EmptyFolder, NiftiError, NoDicom, NoPixels, NoSeries, NotCT,
                          read_series, write_series)
from cspine.presets import CspineError

# HU by which a lossy syntax may change a value of `block` or `smooth`; jpeg_baseline has 17 HU a step
OFF = dict(jpeg_baseline=100, jpeg_extended=15, jpegls_near=2, jpeg2000_lossy=12, htj2k_lossy=25)

def block(shape=(12, 20, 16), seed=0):
    "Noise around a gradient that differs along every axis, and an affine whose spacings and origin all differ."
    z, y, x = np.indices(shape)
    hu = 40*z + 9*y - 25*x + np.random.default_rng(seed).normal(0, 30, shape)
    affine = np.array([(0, 0, .4, -11.5), (0, .5, 0, 7.25), (-.8, 0, 0, 101.125), (0, 0, 0, 1)])
    return np.rint(hu).astype('i2'), affine


@pytest.fixture
def series(tmp_path):
    hu, affine = block()
    return hu, affine, write_series(hu, affine, tmp_path/'study')


def same(volume, hu, affine, within=0):
    assert volume.hu.dtype == np.int16 and volume.hu.shape == hu.shape
    assert np.abs(volume.hu.astype(int) - hu).max() <= within
    assert np.allclose(volume.affine, affine, atol=1e-6), volume.affine
    return volume


def edit(path, **attributes):
    "Change attributes of a file; None deletes."
    ds = pydicom.dcmread(path)
    for name, value in attributes.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    ds.save_as(path)


# values

@pytest.mark.parametrize('low', [False, True])  # below -1024 HU the values are stored signed
@pytest.mark.parametrize('syntax', [s for s in SYNTAXES if s not in LOSSY])
def test_every_syntax_is_exact(tmp_path, syntax, low):
    hu, affine = block((4, 33, 21))
    if low:
        hu[0, :2, :2] = [[-32768, -3024], [32767, -1025]]
    folder = write_series(hu, affine, tmp_path/'a', syntax=syntax)
    ds = pydicom.dcmread(folder/'1.dcm')
    assert ds.file_meta.TransferSyntaxUID == SYNTAXES[syntax] and ds.PixelRepresentation == low
    volume = same(read_series(folder), hu, affine)
    assert volume.notes == [] and volume.uid == ds.StudyInstanceUID and np.allclose(volume.spacing, (.8, .5, .4))
    again = write_series(hu, affine, tmp_path/'b', syntax=syntax)
    assert sorted(p.name for p in again.iterdir()) == ['1.dcm', '2.dcm', '3.dcm', '4.dcm']
    for p in folder.iterdir():
        assert p.read_bytes() == (again/p.name).read_bytes()


@pytest.mark.parametrize('syntax', LOSSY)
def test_lossy_syntaxes_change_values_a_little(tmp_path, syntax):
    hu, affine = block((2, 33, 21))
    volume = same(read_series(write_series(hu, affine, tmp_path, syntax=syntax)), hu, affine, OFF[syntax])
    assert (volume.hu != hu).any() and volume.notes == []


@pytest.mark.parametrize('syntax', ['explicit', 'implicit', 'big_endian', 'deflated', 'rle'])
def test_pydicom_agrees(tmp_path, syntax):
    hu, affine = block((2, 9, 8))
    for k in range(2):
        ds = pydicom.dcmread(write_series(hu, affine, tmp_path, uid='1.2.3', syntax=syntax)/f'{k+1}.dcm')
        assert (ds.pixel_array*ds.RescaleSlope + ds.RescaleIntercept == hu[k]).all() and ds.StudyInstanceUID == '1.2.3'
        assert np.allclose(ds.ImagePositionPatient, affine[:3] @ (k, 0, 0, 1))
        assert np.allclose(ds.ImageOrientationPatient, (1, 0, 0, 0, 1, 0)) and list(ds.PixelSpacing) == [.5, .4]


def test_jpeg_lossless_of_any_predictor(series):
    "Syntax .57 by another encoder: predictor 6, 12 bits."
    import imagecodecs
    from pydicom.encaps import encapsulate
    hu, affine, folder = series
    for p in folder.iterdir():
        ds = pydicom.dcmread(p)
        frame = imagecodecs.jpeg_encode(ds.pixel_array.astype('u2'), lossless=True, predictor=6, bitspersample=12)
        ds.PixelData = encapsulate([frame[:100], frame[100:]])  # one frame in several fragments
        ds['PixelData'].VR, ds['PixelData'].is_undefined_length = 'OB', True
        ds.BitsStored, ds.HighBit = 12, 11
        ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.4.57'
        ds.save_as(p)
    assert same(read_series(folder), hu, affine).notes == []


@pytest.mark.parametrize('syntax', ['1.2.840.10008.1.2.2', '1.2.840.10008.1.2.1.99'])
def test_big_endian_and_deflated(series, syntax):
    hu, affine, folder = series
    for p in folder.iterdir():
        ds = pydicom.dcmread(p)
        big = syntax.endswith('2.2')
        if big:
            ds.PixelData = ds.pixel_array.astype('>u2').tobytes()
        ds.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(p, ds, implicit_vr=False, little_endian=not big, force_encoding=True)
    same(read_series(folder), hu, affine)


def test_slope_and_intercept_per_slice(tmp_path):
    hu, affine = block((3, 8, 8))
    folder = write_series(hu - hu % 2, affine, tmp_path/'a', series=dict(RescaleSlope=2, RescaleIntercept=-2000))
    other = write_series(hu, affine, tmp_path/'b', series=dict(RescaleSlope=1, RescaleIntercept=-8192))
    shutil.copy(other/'2.dcm', folder/'2.dcm')
    edit(folder/'2.dcm', SeriesInstanceUID=pydicom.dcmread(folder/'1.dcm').SeriesInstanceUID)
    volume = read_series(folder)
    assert (volume.hu[1] == hu[1]).all() and (volume.hu[::2] == (hu - hu % 2)[::2]).all()
    assert len(volume.notes) == 1 and 'rescale' in volume.notes[0]


def test_fractional_slope_rounds_and_clips(tmp_path):
    hu, affine = block((1, 8, 8))
    folder = write_series(hu, affine, tmp_path)
    stored = pydicom.dcmread(folder/'1.dcm').pixel_array
    edit(folder/'1.dcm', RescaleSlope='1.5', RescaleIntercept='-1024.25')
    assert (read_series(folder).hu[0] == np.rint(stored*1.5 - 1024.25)).all()
    edit(folder/'1.dcm', RescaleSlope='300', RescaleIntercept='0')
    assert (read_series(folder).hu[0] == np.minimum(stored.astype(int)*300, 32767)).all()


def test_values_above_16_bits_are_clipped_not_wrapped(tmp_path):
    hu, affine = block((1, 8, 8))
    folder = write_series(hu, affine, tmp_path)
    ds = pydicom.dcmread(folder/'1.dcm')
    ds.PixelData, ds.RescaleIntercept = np.full((8, 8), 40000, '<u2').tobytes(), -1024
    ds.save_as(folder/'1.dcm')
    assert (read_series(folder).hu == 32767).all()
    edit(folder/'1.dcm', RescaleIntercept=-10000)
    assert (read_series(folder).hu == 30000).all()


@pytest.mark.parametrize('signed', [0, 1])
def test_rubbish_above_bits_stored_is_masked(tmp_path, signed):
    hu, affine = block((2, 8, 8))
    more = dict(BitsStored=12, PixelRepresentation=signed, RescaleIntercept=0 if signed else -1024)
    folder = write_series(hu, affine, tmp_path, series=more)
    assert (hu < 0).any()
    for p in folder.iterdir():
        ds = pydicom.dcmread(p)
        a = np.frombuffer(ds.PixelData, '<u2') & 0xFFF
        ds.PixelData = (a | np.random.default_rng(0).integers(0, 16, a.shape).astype('u2') << 12).tobytes()
        ds.save_as(p)
    same(read_series(folder), hu, affine)


def test_padding_is_air_and_tissue_is_not_padding(tmp_path):
    hu, affine = block((2, 8, 8))
    padded = hu.copy()
    padded[:, :2] = -3024
    folder = write_series(padded, affine, tmp_path/'a', series=dict(
        PixelRepresentation=1, RescaleIntercept=-1024, PixelPaddingValue=-2000))
    hu[:, :2] = -1024
    assert same(read_series(folder), hu, affine).notes == []
    hu[:, :2] = 0
    folder = write_series(hu, affine, tmp_path/'b', series=dict(
        PixelRepresentation=1, RescaleIntercept=0, PixelPaddingValue=0))
    assert 'padding' in same(read_series(folder), hu, affine).notes[0]


def test_monochrome1_and_foreign_units_are_noted(tmp_path):
    hu, affine = block((2, 8, 8))
    folder = write_series(hu, affine, tmp_path, series=dict(PhotometricInterpretation='MONOCHROME1', RescaleType='US'))
    notes = same(read_series(folder), hu, affine).notes
    assert any('MONOCHROME1' in n for n in notes) and any('US' in n for n in notes)


def test_values_that_do_not_fit_are_refused(tmp_path):
    hu, affine = block()
    with pytest.raises(DicomError, match='do not fit'):
        write_series(hu*10, affine, tmp_path, series=dict(BitsStored=12))
    with pytest.raises(DicomError, match='jpeg2000'):
        write_series(hu, affine, tmp_path, syntax='jpeg')


# geometry

def test_file_names_mean_nothing(series):
    hu, affine, folder = series
    files = sorted(folder.iterdir())
    for k, p in zip(np.random.default_rng(3).permutation(len(files)), files):
        p.rename(folder/f'x{k}')
    assert same(read_series(folder), hu, affine).notes == []


def test_feet_first_and_mirrored_acquisitions(tmp_path):
    hu, affine = block()
    n = np.array(hu.shape) - 1
    for name, axes in dict(feet=(0,), rows=(1,), columns=(2,), prone=(1, 2), all=(0, 1, 2)).items():
        A = affine.copy()
        for a in axes:
            A[:3, 3] += affine[:3, a]*n[a]
            A[:3, a] *= -1
        same(read_series(write_series(np.flip(hu, axes), A, tmp_path/name)), hu, affine)


@pytest.mark.parametrize('axes', [(2, 0, 1), (1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize('syntax', ['explicit', 'jpeg_lossless'])
def test_sagittal_coronal_and_turned_acquisitions(tmp_path, axes, syntax):
    hu, affine = block()
    folder = write_series(hu.transpose(axes), affine[:, [*axes, 3]], tmp_path, syntax=syntax)
    assert same(read_series(folder), hu, affine).notes == []


def test_a_turned_head_stays_in_the_affine(tmp_path):
    hu, affine = block()
    c, s = np.cos(.2), np.sin(.2)
    turned = np.eye(4)
    turned[:3, :3] = np.array([(c, -s, 0), (s, c, 0), (0, 0, 1)]) @ np.array([(1, 0, 0), (0, c, -s), (0, s, c)])
    volume = same(read_series(write_series(hu, turned @ affine, tmp_path)), hu, turned @ affine)
    assert volume.notes == [] and np.allclose(volume.spacing, (.8, .5, .4))


def test_a_tilted_gantry_stays_in_the_affine_where_asked(tmp_path):
    hu, affine = block()
    affine[1, 0] = .2  # each slice lies 0.2 mm further back than the one above
    volume = same(read_series(write_series(hu, affine, tmp_path), straighten=False), hu, affine)
    assert volume.notes == ['tilted gantry, 14.0 degrees: sheared, as the affine says']


def test_real_one_slice_study(tmp_path):
    path = get_testdata_file('CT_small.dcm')
    shutil.copy(path, tmp_path)
    ds, volume = pydicom.dcmread(path), read_series(tmp_path)
    assert volume.shape == (1, 128, 128) and volume.uid == ds.StudyInstanceUID
    assert np.allclose(volume.spacing, (5, .661468, .661468)) and 'one slice' in volume.notes[0]
    assert (volume.hu[0] == np.maximum(ds.pixel_array - 1024, -1024)).all()  # its padding value is -2000
    assert np.allclose(volume.affine[:3, 3], ds.ImagePositionPatient)
    assert np.allclose(volume.affine[:3, :3], [(0, 0, .661468), (0, .661468, 0), (-5, 0, 0)])


@pytest.mark.parametrize('by, words', [('location', 'slice location'), ('instance', 'instance number'), ('name', 'file name')])
def test_without_positions_the_next_best_order_is_taken_and_said(series, by, words):
    hu, affine, folder = series
    for k in range(len(hu)):
        edit(folder/f'{k+1}.dcm', ImagePositionPatient=None, ImageOrientationPatient=None,
             InstanceNumber=k if by != 'name' else None, **(dict(SliceLocation=f'{-.8*k:.2f}') if by == 'location' else {}))
    if by == 'instance':
        for k in range(len(hu)):
            (folder/f'{k+1}.dcm').rename(folder/f'a{99-k}')
    volume = read_series(folder)
    assert (volume.hu == hu).all() and np.allclose(volume.spacing, (.8, .5, .4))
    assert any(words in n for n in volume.notes) and any('orientation' in n for n in volume.notes)


# what is odd

def test_duplicates_gaps_and_letters_are_noted(series):
    hu, affine, folder = series
    shutil.copy(folder/'5.dcm', folder/'copy.dcm')
    (folder/'9.dcm').unlink()
    (folder/'readme.dcm').write_text('this is a letter\n'*40)
    (folder/'nothing.dcm').touch()
    volume = same(read_series(folder, even=False), np.delete(hu, 8, 0), affine)
    text = '\n'.join(volume.notes)
    assert len(volume.notes) == 3
    for words in ('readme.dcm is not DICOM', 'nothing.dcm is empty', 'copy.dcm',
                  'gap of 1.60 mm between 10.dcm and 8.dcm; the other slices are 0.80 mm apart'):
        assert words in text, text
    hu[8] = np.rint(hu[7]/2 + hu[9]/2)
    notes = same(read_series(folder), hu, affine).notes
    assert 'gap of 1.60 mm between 10.dcm and 8.dcm; filled by interpolation' in notes


def test_a_damaged_slice_is_replaced_by_its_duplicate(series):
    hu, affine, folder = series
    shutil.copy(folder/'5.dcm', folder/'copy.dcm')
    (folder/'5.dcm').write_bytes((folder/'5.dcm').read_bytes()[:1200])
    same(read_series(folder), hu, affine)


def test_uneven_spacing_is_evened(series):
    hu, affine, folder = series
    edit(folder/'4.dcm', ImagePositionPatient=[-11.5, 7.25, 101.125 - .8*3 - .2])  # a quarter of the spacing too low
    volume = same(read_series(folder, even=False), hu, affine)
    assert volume.notes == ['uneven spacing: 0.60 to 1.00 mm; the median, 0.80 mm, is taken']
    hu[3] = np.rint(hu[3]*.8 + hu[2]*.2)
    volume = same(read_series(folder), hu, affine)
    assert volume.notes == ['uneven spacing: 0.60 to 1.00 mm; evened to 0.80 mm by interpolation']


def test_mixed_sizes_keep_the_majority(series, tmp_path):
    hu, affine, folder = series
    other, A = block((3, 24, 16))
    A[2, 3] = 300
    uid = pydicom.dcmread(folder/'1.dcm').SeriesInstanceUID
    for p in write_series(other, A, tmp_path/'o', series=dict(SeriesInstanceUID=uid)).iterdir():
        shutil.copy(p, folder/f'o{p.name}')
    assert 'left out 3 of another size' in same(read_series(folder), hu, affine).notes[0]


def test_of_several_series_the_one_with_most_axial_slices(series, tmp_path):
    hu, affine, folder = series
    sagittal, _ = block((16, 20, 30), seed=5)  # more slices, but not axial
    for p in write_series(sagittal, affine[:, [2, 1, 0, 3]], tmp_path/'s').iterdir():
        shutil.copy(p, folder/f's{p.name}')
    for p in write_series(hu[:5] + 1, affine, tmp_path/'t').iterdir():
        shutil.copy(p, folder/f't{p.name}')
    note, = same(read_series(folder), hu, affine).notes
    assert 'took series 1 (12 slices of 20x16), because it is axial' in note
    assert 'left out series 1 (16 slices of 20x30), series 1 (5 slices of 20x16)' in note


@pytest.mark.parametrize('ours, theirs, why', [
    (dict(SeriesDescription='C-SPINE BONE'), dict(SeriesDescription='HEAD 1.0'), "series 7 'C-SPINE BONE' (12 slices of 20x16), because the others name another part of the body"),
    (dict(BodyPartExamined='NECK'), {}, 'because its description names the neck'),
    ({}, dict(ProtocolName='Chest routine'), 'because the others name another part of the body'),
    ({}, dict(ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']), 'because the others are scouts')])
def test_the_series_that_is_the_neck_is_taken_and_why(tmp_path, ours, theirs, why):
    hu, affine = block()
    folder = write_series(hu, affine, tmp_path/'a', series=dict(SeriesNumber=7) | ours)
    for p in write_series(np.repeat(hu, 2, 0) + 1, affine, tmp_path/'b', series=theirs).iterdir():
        shutil.copy(p, folder/f'b{p.name}')
    note, = same(read_series(folder), hu, affine).notes
    assert why in note and 'left out series 1' in note and '(24 slices' in note


@pytest.mark.parametrize('ours, theirs, n, why', [
    # words do not make one slice a volume, nor a projection or a reformat the scan
    (dict(SeriesDescription='AX 0.625 BONE'), dict(SeriesDescription='Neck Monitoring'), 1, 'the others are a few slices only'),
    (dict(BodyPartExamined='HEAD'), dict(SeriesDescription='Monitoring'), 1, 'the others are a few slices only'),
    (dict(SeriesDescription='C-SPINE'), dict(SeriesDescription='C-SPINE thin', ImageType=['DERIVED', 'SECONDARY', 'AXIAL', 'MIP']), 24, 'the others are projections'),
    (dict(SeriesDescription='C-SPINE'), dict(SeriesDescription='C-SPINE', ImageType=['DERIVED', 'SECONDARY', 'AXIAL']), 24, 'the others are derived'),
    (dict(SeriesDescription='C-SPINE BONE'), dict(SeriesDescription='C-SPINE', SeriesNumber=2), 12, 'it is of a bone kernel'),
    # a word that goes on counts, the end of another does not
    (dict(SeriesDescription='05_HWS_Trauma 1.0'), dict(SeriesDescription='Polytrauma 1.0'), 24, 'its description names the neck'),
    (dict(SeriesDescription='AXIAL SPINE BONE'), dict(SeriesDescription='LUMBAR'), 24, 'the others name another part of the body'),
    (dict(SeriesDescription='C SPINE'), dict(SeriesDescription='THORACIC SPINE'), 24, 'the others name another part of the body')])
def test_words_decide_after_what_the_slices_are(tmp_path, ours, theirs, n, why):
    hu, affine = block()
    folder = write_series(hu, affine, tmp_path/'a', series=dict(SeriesNumber=7) | ours)
    for p in write_series(np.resize(hu, (n, *hu.shape[1:])) + 1, affine, tmp_path/'b', series=theirs).iterdir():
        shutil.copy(p, folder/f'b{p.name}')
    note, = same(read_series(folder), hu, affine).notes
    assert f'because {why}' in note and 'took series 7' in note


def test_an_axial_series_before_its_sagittal_reformat(tmp_path):
    hu, affine = block()
    folder = write_series(hu, affine, tmp_path/'a', series=dict(SeriesDescription='AX 0.625 BONE'))
    for p in write_series(hu.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]], tmp_path/'b', series=dict(SeriesDescription='SAG C-SPINE MPR')).iterdir():
        shutil.copy(p, folder/f'b{p.name}')
    assert 'because it is axial' in same(read_series(folder), hu, affine).notes[0]


def test_a_few_axial_slices_are_not_the_series(tmp_path):
    "As a bolus tracker leaves them beside the reformats of a neck."
    hu, affine = block()
    folder = write_series(hu.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]], tmp_path/'a')
    for p in write_series(hu[:3], affine, tmp_path/'b').iterdir():
        shutil.copy(p, folder/f'b{p.name}')
    note, = same(read_series(folder), hu, affine).notes
    assert 'because the others are a few slices only' in note


def test_scouts_alone_are_no_series(tmp_path):
    with pytest.raises(NoSeries, match=r'scout views only \(1.dcm, 2.dcm'):
        read_series(write_series(*block(), tmp_path, series=dict(ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])))


def test_positions_written_with_few_digits_do_not_drift(tmp_path):
    hu = np.repeat(block()[0], 25, 0)
    affine = np.array([(0, 0, .4, 0), (0, .5, 0, 0), (-.625, 0, 0, 0), (0, 0, 0, 1)])
    folder = write_series(hu, affine, tmp_path)
    for k in range(len(hu)):
        edit(folder/f'{k+1}.dcm', ImagePositionPatient=[0, 0, round(-.625*k, 2)])
    volume = read_series(folder)
    assert (volume.hu == hu).all() and np.abs((volume.affine - affine) @ (299, 0, 0, 1)).max() < .02 and said(volume) == []


def test_other_modalities_beside_a_ct_are_left_out(series):
    hu, affine, folder = series
    shutil.copy(get_testdata_file('MR_small.dcm'), folder/'mr.dcm')
    assert 'mr.dcm is MR, not CT' in same(read_series(folder), hu, affine).notes[0]


@pytest.mark.parametrize('syntax', SYNTAXES)
def test_a_cut_off_slice_is_filled_from_its_neighbours(tmp_path, syntax):
    hu, affine = block()
    folder = write_series(hu, affine, tmp_path, syntax=syntax)
    path = folder/'6.dcm'
    path.write_bytes(path.read_bytes()[:-60])  # in the pixels
    volume = read_series(folder)
    hu[5] = np.rint(hu[4]/2 + hu[6]/2)
    same(volume, hu, affine, OFF.get(syntax, 0))
    assert volume.notes == ['1 damaged slice filled from the neighbours: 6.dcm is cut off']


def test_a_frame_that_is_cut_off_in_its_second_fragment(tmp_path):
    from pydicom.encaps import encapsulate
    hu, affine = block()
    folder = write_series(hu, affine, tmp_path, syntax='jpeg_lossless')
    ds = pydicom.dcmread(folder/'6.dcm')
    frame = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = encapsulate([frame], fragments_per_frame=2)
    ds['PixelData'].is_undefined_length = True
    ds.save_as(folder/'6.dcm')
    same(read_series(folder), hu, affine)
    (folder/'6.dcm').write_bytes((folder/'6.dcm').read_bytes()[:-60])
    assert read_series(folder).notes == ['1 damaged slice filled from the neighbours: 6.dcm is cut off']


def test_a_cut_off_end_slice_is_a_copy(series):
    hu, affine, folder = series
    (folder/'1.dcm').write_bytes((folder/'1.dcm').read_bytes()[:1200])
    hu[0] = hu[1]
    same(read_series(folder), hu, affine)


# what cannot be read

@pytest.mark.parametrize('cut', [300, 1200, -60])  # in the header, before the pixels, in the pixels
@pytest.mark.parametrize('syntax', ['explicit', 'jpeg2000', 'rle'])
def test_a_cut_off_study(tmp_path, cut, syntax):
    folder = write_series(*block(), tmp_path, syntax=syntax)
    for p in folder.iterdir():
        p.write_bytes(p.read_bytes()[:cut])
    with pytest.raises(DamagedSeries, match='cut off') as e:
        read_series(folder)
    assert str(folder) in str(e.value) and '.dcm' in str(e.value)


def test_too_many_damaged_slices(series):
    hu, affine, folder = series
    for k in (3, 7):  # 2 of 12
        (folder/f'{k}.dcm').write_bytes((folder/f'{k}.dcm').read_bytes()[:-9])
    with pytest.raises(DamagedSeries, match='2 of 12 slices .* 7.dcm is cut off'):
        read_series(folder)


def test_hopeless_folders(tmp_path):
    for name in ('empty', 'letter', 'mr', 'dirs'):
        (tmp_path/name).mkdir()
    (tmp_path/'dirs'/'more').mkdir()
    (tmp_path/'letter'/'1.dcm').write_text('not a scan')
    shutil.copy(get_testdata_file('MR_small.dcm'), tmp_path/'mr')
    for name, kind, words in (('nowhere', EmptyFolder, 'There is no .*nowhere'), ('empty', EmptyFolder, 'no files'),
                              ('dirs', EmptyFolder, 'no files'), ('letter', NoDicom, '1.dcm is not DICOM'),
                              ('mr', NotCT, 'MR_small.dcm is MR')):
        with pytest.raises(kind, match=words) as e:
            read_series(tmp_path/name)
        assert str(tmp_path/name) in str(e.value) and isinstance(e.value, (DicomError, CspineError))


def test_no_damage_escapes_as_another_error(tmp_path):
    "Cut, overwritten and zeroed files in a process of their own: a volume or a DicomError, never a crash."
    code = f'''
import logging, warnings, numpy as np
from pathlib import Path
from cspine.dicom import DicomError, read_series, write_series, SYNTAXES
warnings.simplefilter("ignore"); logging.disable(logging.CRITICAL)
rng, folder, ends = np.random.default_rng(7), Path({str(tmp_path)!r}), set()
hu = rng.normal(0, 200, (1, 24, 20)).astype("i2")
for syntax in SYNTAXES:
    path = write_series(hu, np.diag([-1., 1, 1, 1])[:, [2, 1, 0, 3]], folder/syntax, syntax=syntax)/"1.dcm"
    good = path.read_bytes()
    for i in range(60):
        b, a = bytearray(good), int(rng.integers(0, len(good)))
        if i % 3 == 0: b = b[:a]
        elif i % 3 == 1: b[a:a+200] = bytes(len(b[a:a+200]))
        else:
            for k in rng.integers(132, len(b), 12): b[k] = rng.integers(0, 256)
        path.write_bytes(b)
        try: ends.add(read_series(path.parent).hu.dtype.name)
        except DicomError as e: ends.add(type(e).__name__)
print(sorted(ends))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert 'DamagedSeries' in done.stdout and 'int16' in done.stdout


def test_import_without_torch():
    code = 'import sys, cspine.dicom; sys.exit("torch" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
def test_nifti_of_all_48_axis_codes(tmp_path, suffix):
    import itertools
    import nibabel as nib
    hu, affine = block((5, 4, 3))
    ours = nib.Nifti1Image(hu, np.diag([-1, -1, 1, 1]) @ affine)
    codes = [''.join(c) for p in itertools.permutations(('LR', 'AP', 'SI')) for c in itertools.product(*p)]
    assert len(set(codes)) == 48
    for code in codes:
        turn = nib.orientations.ornt_transform(nib.io_orientation(ours.affine), nib.orientations.axcodes2ornt(code))
        nib.save(ours.as_reoriented(turn), tmp_path/f'{code}{suffix}')
        volume = same(read_series(tmp_path/f'{code}{suffix}'), hu, affine)
        assert volume.uid == code and volume.notes == [f'the lowest value is {hu.min()}: no air, so these may not be Hounsfield units']


def test_nifti_in_a_folder_scaled_and_refused(tmp_path):
    import nibabel as nib
    hu, affine = block()
    img = nib.Nifti1Image(np.where(hu > 300, np.nan, hu - 1000).astype('f4'), np.diag([-1, -1, 1, 1]) @ affine)
    (tmp_path/'study').mkdir()
    nib.save(img, tmp_path/'study'/'ct.nii.gz')
    volume = same(read_series(tmp_path/'study'), np.where(hu > 300, -1024, hu - 1000), affine)
    assert volume.notes == [f'{(hu > 300).sum()} voxels without a number, taken for air']
    scaled = nib.Nifti1Image(hu, np.diag([-1, -1, 1, 1]) @ affine)
    scaled.header.set_slope_inter(2, -1000)  # the array is what is stored
    nib.save(scaled, tmp_path/'scaled.nii')
    same(read_series(tmp_path/'scaled.nii'), 2*hu - 1000, affine)
    nib.save(img, tmp_path/'study'/'again.nii')
    with pytest.raises(NiftiError, match='2 NIfTI files'):
        read_series(tmp_path/'study')
    (tmp_path/'cut.nii').write_bytes((tmp_path/'study'/'again.nii').read_bytes()[:2000])
    with pytest.raises(NiftiError, match='cut.nii cannot be read'):
        read_series(tmp_path/'cut.nii')
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 3), 'i2'), np.eye(4)), tmp_path/'four.nii')
    with pytest.raises(NiftiError, match='4 dimensions'):
        read_series(tmp_path/'four.nii')
    huge = bytearray((tmp_path/'study'/'again.nii').read_bytes())
    huge[42:48] = np.array([30000, 30000, 30000], '<i2').tobytes()
    (tmp_path/'huge.nii').write_bytes(huge)
    with pytest.raises(NiftiError, match='header is damaged'):
        read_series(tmp_path/'huge.nii')


# what archives, disks and anonymisers make of a study

def edited(folder, change, only=lambda k: True):
    """Every file of a series, changed in place: `change(data set, number)`."""
    for k, p in enumerate(sorted(folder.iterdir(), key=lambda p: int(p.stem))):
        ds = pydicom.dcmread(p)
        if only(k): change(ds, k); ds.save_as(p)
    return folder


def drop(*names):
    def change(ds, k):
        for name in names: delattr(ds, name)
    return change


@pytest.mark.parametrize('beside', ['README.TXT', 'DICOMDIR', '.DS_Store', '__MACOSX/._1.dcm', 'S1/.hidden.dcm'])
def test_slices_below_the_folder_are_found_whatever_lies_beside_them(tmp_path, beside):
    hu, affine = block()
    write_series(hu, affine, tmp_path/'study/S1')
    path = tmp_path/'study'/beside
    path.parent.mkdir(exist_ok=True)
    path.write_text('no slice')
    volume = same(read_series(tmp_path/'study'), hu, affine)
    assert all(beside in n for n in volume.notes) and len(volume.notes) == (beside in ('README.TXT', 'DICOMDIR'))


def test_a_linked_folder_is_followed_and_a_circle_is_not(tmp_path):
    hu, affine = block()
    write_series(hu, affine, tmp_path/'elsewhere/S1')
    (tmp_path/'study').mkdir()
    (tmp_path/'study/S1').symlink_to(tmp_path/'elsewhere/S1')
    (tmp_path/'elsewhere/S1/again').symlink_to(tmp_path/'study')
    assert same(read_series(tmp_path/'study'), hu, affine).notes == []


def test_a_data_set_is_no_study(tmp_path):
    write_series(*block(), tmp_path/'train_images/1.2')
    (tmp_path/'train.csv').write_text('StudyInstanceUID')
    with pytest.raises(EmptyFolder, match='holds train.csv, so it is a data set; give the folder of one study'): read_series(tmp_path)


def test_a_listing_that_fails_is_said(tmp_path, monkeypatch):
    def walk(top, onerror, **kw):
        onerror(PermissionError(13, 'Permission denied', f'{top}/S1'))
        yield
    monkeypatch.setattr('os.walk', walk)
    with pytest.raises(EmptyFolder, match=r'S1 cannot be listed \(Permission denied\)'): read_series(tmp_path)


@pytest.mark.skipif(not Path('/dev/null').exists(), reason='only Unix has this device to be refused; a folder that is none is tested everywhere')
def test_a_device_is_no_study():
    with pytest.raises(EmptyFolder, match='neither a folder nor a file'): read_series('/dev/null')


def test_a_nifti_beside_its_side_files(tmp_path):
    import nibabel as nib
    hu, affine = block()
    nib.save(nib.Nifti1Image(hu.transpose(2, 1, 0), np.diag([-1., -1, 1, 1]) @ affine[:, [2, 1, 0, 3]]), tmp_path/'ct.nii.gz')
    (tmp_path/'ct.json').write_text('{}')
    same(read_series(tmp_path), hu, affine)
    write_series(hu + 1, affine, tmp_path/'dicom')
    volume = same(read_series(tmp_path), hu + 1, affine)
    assert 'left out 1 NIfTI file beside the slices: ct.nii.gz' in volume.notes


def test_two_kernels_in_one_series_are_not_woven_together(tmp_path):
    hu, affine = block((20, 20, 16))
    folder = write_series(hu, affine, tmp_path/'a', series=dict(ConvolutionKernel='H60s'))
    thick = affine.copy(); thick[:3, 0] *= 1.5
    for p in write_series(hu[:12] + 5, thick, tmp_path/'b', series=dict(ConvolutionKernel='H30s')).iterdir():
        ds = pydicom.dcmread(p); ds.SeriesInstanceUID = pydicom.dcmread(folder/'1.dcm').SeriesInstanceUID; ds.save_as(folder/f'9{p.name}')
    note, = same(read_series(folder), hu, affine).notes
    assert 'left out 12 of another kernel' in note


def test_two_phases_in_one_series_are_not_woven_together(tmp_path):
    hu, affine = block((20, 20, 16))
    folder = write_series(hu, affine, tmp_path/'a', series=dict(AcquisitionNumber=1))
    later = affine.copy(); later[:3, 3] += .4*affine[:3, 0]
    for p in write_series(hu + 300, later, tmp_path/'b', series=dict(AcquisitionNumber=2)).iterdir():
        ds = pydicom.dcmread(p); ds.SeriesInstanceUID = pydicom.dcmread(folder/'1.dcm').SeriesInstanceUID; ds.save_as(folder/f'9{p.name}')
    note, = same(read_series(folder), hu, affine).notes
    assert 'left out 20 of another acquisition' in note


def test_an_acquisition_for_each_turn_of_the_tube_is_one_series(tmp_path):
    hu, affine = block((40, 20, 16))
    def turn(ds, k): ds.AcquisitionNumber = 1 + k//13
    assert same(read_series(edited(write_series(hu, affine, tmp_path), turn)), hu, affine).notes == []


@pytest.mark.parametrize('axes', [[2, 0, 1], [1, 0, 2]])
def test_without_positions_slices_lie_along_their_normal(tmp_path, axes):
    "The place in the plane is lost, the order is not."
    hu, affine = block()
    folder = write_series(hu.transpose(axes), affine[:, [*axes, 3]], tmp_path)
    def change(ds, k): ds.SliceLocation = float(affine[:3, axes[0]] @ np.r_[affine[:3, axes[0]]]*k/np.linalg.norm(affine[:3, axes[0]])); del ds.ImagePositionPatient
    volume = read_series(edited(folder, change))
    assert (volume.hu == hu).all() and np.allclose(volume.spacing, np.linalg.norm(affine[:3, :3], axis=0))
    assert volume.notes == ['no positions in the files; ordered by slice location']


def test_a_tilt_without_positions_is_not_made_up(tmp_path):
    hu, affine = block()
    def change(ds, k):
        ds.ImageOrientationPatient, ds.SliceLocation = [1, 0, 0, 0, .95533649, .29552021], -float(k); del ds.ImagePositionPatient
    volume = read_series(edited(write_series(hu, affine, tmp_path), change))
    assert (volume.hu == hu).all() and volume.notes == ['no positions in the files; ordered by slice location']


def test_one_position_for_all_slices_is_none(tmp_path):
    hu, affine = block()
    def change(ds, k): ds.SliceLocation, ds.ImagePositionPatient = -1.5*k, [0, 0, 0]
    volume = read_series(edited(write_series(hu, affine, tmp_path), change))
    assert (volume.hu == hu).all() and volume.notes == ['the same position in most files, so not used; ordered by slice location']


def test_every_slice_twice_is_still_placed(tmp_path):
    hu, affine = block()
    folder = write_series(hu, affine, tmp_path)
    for k in range(1, 13): shutil.copy(folder/f'{k}.dcm', folder/f'{k}_copy.dcm')
    note, = same(read_series(folder), hu, affine).notes
    assert note.startswith('left out 12 slices at a position that another holds')


def test_a_stray_with_a_position_does_not_cost_the_series(tmp_path):
    hu, affine = block()
    folder = edited(write_series(hu, affine, tmp_path/'a'), drop('ImagePositionPatient'))
    shutil.copy(write_series(hu[:1], affine, tmp_path/'b')/'1.dcm', folder/'x.dcm')
    volume = read_series(folder)
    assert (volume.hu == hu).all() and 'because the others are a few slices only' in volume.notes[0]


def test_a_series_for_every_slice_is_one(tmp_path):
    hu, affine = block()
    def change(ds, k): ds.SeriesInstanceUID = f'1.2.3.{k}'
    volume = same(read_series(edited(write_series(hu, affine, tmp_path), change)), hu, affine)
    assert volume.notes == ['each of the 12 slices names a series of its own; taken as one']


def test_a_slice_without_orientation_takes_that_of_the_others(tmp_path):
    hu, affine = block()
    folder = edited(write_series(hu, affine, tmp_path), drop('ImageOrientationPatient'), only=lambda k: k == 6)
    note, = same(read_series(folder), hu, affine).notes
    assert note == "1 slice without an orientation; took the other slices': 7.dcm"


def test_half_a_series_destroyed_is_no_series(tmp_path):
    folder = write_series(*block(), tmp_path)
    for k in range(1, 12, 2):
        p = folder/f'{k}.dcm'
        p.write_bytes(p.read_bytes()[:700] if k % 4 == 1 else b'')
    with pytest.raises(DamagedSeries, match='6 of 12 files in .* are damaged'): read_series(folder)


def test_no_pixel_spacing_is_not_called_damage(tmp_path):
    with pytest.raises(NoPixels, match='has no pixel spacing'):
        read_series(edited(write_series(*block(), tmp_path), drop('PixelSpacing')))


def test_values_far_below_air_are_said(tmp_path):
    hu, affine = block()
    hu[:, :, :4] = -3024
    note, = same(read_series(write_series(hu, affine, tmp_path)), hu, affine).notes
    assert note == 'values down to -3024 HU: padding that the files do not declare; left as it is'


def test_a_folder_of_studies_is_said(tmp_path):
    hu, affine = block()
    write_series(hu, affine, tmp_path/'a', uid='1.2.3')
    write_series(hu[:11] + 1, affine, tmp_path/'b', uid='1.2.4')
    volume = same(read_series(tmp_path), hu, affine)
    assert volume.uid == '1.2.3' and volume.notes[0].startswith('2 studies in the folder; `cspine submit --data`')


def test_a_constant_volume_is_said(tmp_path):
    volume = read_series(write_series(np.full((5, 20, 16), -1024), block()[1], tmp_path))
    assert volume.notes == ['all values are -1024: no picture, or a rescale that gives no Hounsfield units']
