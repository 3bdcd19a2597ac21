"""What public bug reports describe, made anew: each condition is written into a folder, and says what reading it should give.

For test_conditions and scripts/second_opinions.py. A condition is a function of (folder, hu, affine), which writes files
there; it answers with the HU that are right (`hu` where it answers nothing), or with a word of the error that should come.
"""
import struct

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian

from cspine.ctfile import SYNTAXES, encode_frame
from cspine.dicom import write_series
from cspine.oddities import write_enhanced
from cspine.phantom import make_study

CONDITIONS = {}   # name -> (function, a part of the note that should be there; '' for none needed)
TILT = 17


def neck():
    """A phantom of 40 slices of 2 mm, and its affine."""
    v = make_study((77, 3), 96).volume
    step = max(1, round(2/v.spacing[0]))
    hu = v.hu[len(v.hu)//4:][:40*step:step]
    A = v.affine.copy()
    A[:3, 0] *= step
    return np.clip(hu, -1024, 3071), A


def condition(name, says=''):
    def add(f):
        CONDITIONS[name] = f, says
        return f
    return add


def files(folder): return sorted(folder.glob('*.dcm'), key=lambda p: (len(p.name), p.name))


def each(folder, change):
    """Change every file of a folder by `change(ds, k)`."""
    for k, p in enumerate(files(folder)):
        ds = pydicom.dcmread(p)
        change(ds, k)
        ds.save_as(p)


def between(A, by=.5):
    """The affine of slices that lie `by` of a slice further."""
    B = A.copy()
    B[:3, 3] += by*A[:3, 0]
    return B


# two volumes under one name

def two(folder, hu, A, other=None, by=.5, thinner=False, **differs):
    """A series, and the slices of another (a second pass, which moved) among its own."""
    write_series(hu, A, folder, uid='1.2.3')
    B, at = between(A, by), folder/'.other'
    if other is None: other = np.roll(hu, 4, axis=2)[:-1]
    write_series(other, B, at, uid='1.2.3')
    def change(ds, k):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'1.2.3.9.{k}'
        ds.InstanceNumber = 100 + k
        for key, value in differs.items(): setattr(ds, key, value)
    each(at, change)
    for p in files(at): p.rename(folder/f'b{p.name}')
    at.rmdir()


for _name, _said, _differs in (
        ('thickness', 'slice thickness', dict(SliceThickness='3')), ('tube voltage', 'tube voltage', dict(KVP='80')), ('rescale type', 'kind of values', dict(RescaleType='MGML')),
        ('projection', 'kind', dict(ImageType=['DERIVED', 'SECONDARY', 'MIP'])), ('frame of reference', 'frame of reference', dict(FrameOfReferenceUID='1.2.3.77')),
        ('exposure', 'irradiation', dict(IrradiationEventUID='1.2.3.78')), ('time', 'point in time', dict(TemporalPositionIdentifier='2')),
        ('description', 'description', dict(SeriesDescription='late'))):
    CONDITIONS[f'two volumes: another {_name}'] = (lambda folder, hu, A, d=_differs: two(folder, hu, A, **d)), f'left out 39 of another {_said}'


@condition('two volumes: nothing in the headers, half a slice further', 'two volumes, one inside the other')
def _(folder, hu, A): two(folder, hu, A)


@condition('two volumes: nothing in the headers, a third of a slice further', '2 volumes, one inside the other')
def _(folder, hu, A): two(folder, hu, A, by=1/3)


@condition('two volumes: three passes, a third of a slice apart', 'three volumes, one inside the other')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    for j in (1, 2):
        at = folder/f's{j}'
        write_series(np.roll(hu, 4*j, axis=2)[:-1], between(A, j/3), at, uid='1.2.3')
        def change(ds, k, j=j): ds.SOPInstanceUID, ds.InstanceNumber = f'1.2.{j}.{k}', 100*j + k
        each(at, change)


@condition('two volumes, half a slice further, one slice lost', 'two volumes, one inside the other')
def _(folder, hu, A):
    two(folder, hu, A)
    (folder/'b20.dcm').unlink()


@condition('two volumes: a sharper kernel, which no header names', 'every other slice is')
def _(folder, hu, A):
    rng = np.random.default_rng(0)
    two(folder, hu, A, other=((hu[:-1].astype(int) + hu[1:])/2 + rng.normal(0, 120, hu[1:].shape)).clip(-1024, 3071))
    return 'either'


@condition('3 mm slices among 1.5 mm ones', 'left out 19 of another slice thickness')
def _(folder, hu, A):
    B = A.copy()
    B[:3, 0] *= 2
    two(folder, hu, A, other=np.roll(hu, 4, axis=2)[::2][:19], SliceThickness='4')
    each(folder, lambda ds, k: None)
    for p in folder.glob('b*.dcm'):
        ds = pydicom.dcmread(p)
        k = int(p.stem[1:]) - 1
        ds.ImagePositionPatient = [f'{v:.5f}' for v in (A @ (2*k + .5, 0, 0, 1))[:3]]
        ds.save_as(p)


def enhanced_two(folder, hu, A, group, item, values):
    """One enhanced file whose frames are of two volumes; frames differ in `item` of the functional group."""
    two(folder, hu, A)
    names = [p.name for p in files(folder)]
    for k, p in enumerate(files(folder)): p.rename(folder/f'{k + 1:04}.dcm')
    of = ['b' in n for n in names]
    for k, p in enumerate(files(folder)): p.rename(folder/f'{k + 1}.dcm')
    path = write_enhanced(folder, rng=np.random.default_rng(2))
    ds = pydicom.dcmread(path)
    order = np.random.default_rng(2).permutation(len(of))
    for g, k in zip(ds.PerFrameFunctionalGroupsSequence, order):
        extra = Dataset()
        setattr(extra, item, values[of[k]])
        setattr(g, group, [extra])
    ds.save_as(path)


for _item, _said, _group, _values in (
        ('ConvolutionKernel', 'kernel', 'CTReconstructionSequence', ('SHARP', 'SOFT')), ('StackID', 'stack', 'FrameContentSequence', ('1', '2')),
        ('TemporalPositionIndex', 'point in time', 'FrameContentSequence', (1, 2)),
        ('FrameType', 'kind', 'CTImageFrameTypeSequence', (['ORIGINAL', 'PRIMARY', 'VOLUME', 'NONE'], ['DERIVED', 'PRIMARY', 'MAX_IP', 'NONE']))):
    CONDITIONS[f'two volumes in one enhanced file: {_item}'] = (lambda folder, hu, A, a=(_group, _item, _values): enhanced_two(folder, hu, A, *a)), f'left out 39 of another {_said}'


# numbers that are not HU

def stored(folder, hu, A, values, **attributes):
    """A series whose pixels are `values`, (z, y, x) of two bytes, under other attributes."""
    write_series(hu, A, folder, uid='1.2.3')
    def change(ds, k):
        ds.PixelData = np.ascontiguousarray(values[k]).tobytes()
        for key, value in attributes.items():
            if value is None: delattr(ds, key)
            else: setattr(ds, key, value)
    each(folder, change)


@condition("two's complement in 12 bits under PixelRepresentation 0", 'signed numbers of 12 bits')
def _(folder, hu, A):
    hu = hu.clip(-1024, 2047)
    stored(folder, hu, A, hu.astype('i2').view('u2') & 0xFFF, BitsStored=12, HighBit=11, RescaleIntercept=0)
    return hu


@condition("two's complement in 12 of 16 stored bits under PixelRepresentation 0", 'signed numbers of 12 bits')
def _(folder, hu, A):
    hu = hu.clip(-1024, 2047)
    stored(folder, hu, A, hu.astype('i2').view('u2') & 0xFFF, RescaleIntercept=0)
    return hu


@condition("two's complement in 16 bits under PixelRepresentation 0", 'signed numbers of 16 bits')
def _(folder, hu, A): stored(folder, hu, A, hu.astype('i2'), RescaleIntercept=0)


@condition('signed values, PixelRepresentation missing', 'PixelRepresentation is missing')
def _(folder, hu, A): stored(folder, hu, A, hu.astype('i2'), RescaleIntercept=0, PixelRepresentation=None)


@condition('unsigned values, PixelRepresentation missing')
def _(folder, hu, A): stored(folder, hu, A, (hu + 1024).astype('u2'), PixelRepresentation=None)


@condition('unsigned values above 32767 under PixelRepresentation 1', 'values are unsigned')
def _(folder, hu, A): stored(folder, hu, A, ((hu + 1024)*16).astype('u2'), PixelRepresentation=1, RescaleSlope='.0625')


@condition('HighBit 15 and 12 bits, which are the low ones', 'HighBit is 15')
def _(folder, hu, A): stored(folder, hu, A, (hu + 1024).astype('u2'), BitsStored=12, HighBit=15)


@condition('HighBit 15 and 12 bits, which are the low ones, signed', 'HighBit is 15')
def _(folder, hu, A):
    hu = hu.clip(-1024, 2047)
    stored(folder, hu, A, hu.astype('i2'), BitsStored=12, HighBit=15, RescaleIntercept=0, PixelRepresentation=1)
    return hu


@condition('HighBit 15 and 12 bits, which are the high ones')
def _(folder, hu, A): stored(folder, hu, A, ((hu + 1024) << 4).astype('u2'), BitsStored=12, HighBit=15)


@condition('HU + 1024 with intercept 0', '1024 above')
def _(folder, hu, A): stored(folder, hu, A, (hu + 1024).astype('u2'), RescaleIntercept=0)


@condition('HU + 1024, no rescale', '1024 above')
def _(folder, hu, A): stored(folder, hu, A, (hu + 1024).astype('u2'), RescaleIntercept=None, RescaleSlope=None, RescaleType=None)


@condition('every other slice without its rescale intercept', '1024 above the others')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    for p in files(folder)[::2]:
        ds = pydicom.dcmread(p)
        del ds.RescaleIntercept, ds.RescaleSlope
        ds.save_as(p)


@condition("GE's private syntax, pixels of big-endian bytes")
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3', syntax='implicit')
    def change(ds, k): ds.PixelData = (hu[k] + 1024).astype('>u2').tobytes()
    each(folder, change)
    for p in files(folder): set_syntax(p, '1.2.840.113619.5.2')


@condition('bytes of the pixels in the other order', 'in the other order')
def _(folder, hu, A): stored(folder, hu, A, (hu + 1024).astype('>u2'))


@condition('a signed JPEG 2000 stream under PixelRepresentation 0', 'code streams hold signed values')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3', syntax='jpeg2000')
    def change(ds, k):
        ds.PixelData, ds.RescaleIntercept = encapsulate([encode_frame(hu[k].astype('i2'), 'jpeg2000')]), 0
        ds['PixelData'].is_undefined_length = True
    each(folder, change)


@condition("two's complement in 14 of 16 stored bits under PixelRepresentation 0", 'signed numbers of 14 bits')
def _(folder, hu, A): stored(folder, hu, A, np.where(hu < 0, hu + (1 << 14), hu).astype('u2'), RescaleIntercept=0)


@condition("two's complement in 12 bits under PixelRepresentation 1 and 16 stored bits", 'signed numbers of 12 bits')
def _(folder, hu, A):
    hu = hu.clip(-1024, 2047)
    stored(folder, hu, A, hu.astype('i2').view('u2') & 0xFFF, RescaleIntercept=0, PixelRepresentation=1)
    return hu


@condition('an offset of 32768', '32768 above')
def _(folder, hu, A): stored(folder, hu, A, (hu.astype(int) + 32768).astype('u2'), RescaleIntercept=0)


@condition('BitsStored cuts the values', 'the values use 12 bits')
def _(folder, hu, A): stored(folder, hu, A, (hu + 1024).astype('u2'), BitsStored=10, HighBit=9)


@condition('inverted values', 'may not be Hounsfield units')
def _(folder, hu, A):
    out = (-hu.astype(int)).astype('i2')
    stored(folder, hu, A, out, RescaleIntercept=0, PixelRepresentation=1)
    return out


@condition('a rescale slope of .1', 'may not be Hounsfield units')
def _(folder, hu, A):
    stored(folder, hu, A, (hu + 1024).astype('u2'), RescaleSlope='.1')
    return np.rint((hu + 1024)*.1 - 1024)


@condition('an 8-bit window', 'may not be Hounsfield units')
def _(folder, hu, A):
    out = ((hu.astype(int) + 160)/400*255).clip(0, 255).astype('u2')
    stored(folder, hu, A, out)
    return out.astype(int) - 1024


@condition('some slices in another form', '4 slices with values of another kind')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    for k in (10, 11, 20, 30):
        ds = pydicom.dcmread(folder/f'{k}.dcm')
        ds.PixelData, ds.RescaleIntercept = hu[k - 1].astype('i2').tobytes(), 0
        ds.save_as(folder/f'{k}.dcm')
    return 'said'


@condition('metal above the stored bits is no padding')
def _(folder, hu, A):
    v = (hu + 1024).astype('u2')
    v[20, 40:46, 40:46], out = 4096, hu.copy()
    out[20, 40:46, 40:46] = 3071
    stored(folder, hu, A, v, BitsStored=12, HighBit=11)
    return out


@condition('more bytes of pixels than the matrix has', 'more bytes of pixels')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    each(folder, lambda ds, k: setattr(ds, 'PixelData', ds.PixelData + bytes(512)))


@condition('padding of 63536 in 12 bits', 'padding')
def _(folder, hu, A):
    v, out = (hu + 1024).astype('u2'), hu.copy()
    v[:, :6, :], out[:, :6, :] = 63536, -1024
    stored(folder, hu, A, v, BitsStored=12, HighBit=11)
    return out


@condition('declared padding of 63536 in 12 bits', 'padding')
def _(folder, hu, A):
    v, out = (hu + 1024).astype('u2'), hu.copy()
    v[:, :6, :], out[:, :6, :] = 63536, -1024
    stored(folder, hu, A, v, BitsStored=12, HighBit=11)
    each(folder, lambda ds, k: ds.add_new('PixelPaddingValue', 'US', 63536))
    return out


@condition('values of another kind', 'may not be Hounsfield units')
def _(folder, hu, A):
    out = ((hu + 1024)*.3 + 700).astype('i2')
    stored(folder, hu, A, out.astype('u2'), RescaleIntercept=0)
    return out


# NIfTI

def nifti(folder, hu, A, unit='mm', change=None):
    import nibabel as nib
    B = np.diag([-1., -1, 1, 1]) @ A
    scale = dict(mm=1, meter=1e-3, micron=1e3)[unit]
    B[:3] *= scale
    if change is not None: B[:3, :3] = B[:3, :3] @ change
    img = nib.Nifti1Image(hu, B)
    img.header.set_xyzt_units(unit)
    nib.save(img, folder/'ct.nii.gz')


@condition('NIfTI in metres', 'in units of meter')
def _(folder, hu, A): nifti(folder, hu, A, 'meter')


@condition('NIfTI in microns', 'in units of micron')
def _(folder, hu, A): nifti(folder, hu, A, 'micron')


@condition('NIfTI with voxels of 1500 mm', 'error: its voxels are')
def _(folder, hu, A): nifti(folder, hu, A, change=np.eye(3)*1500/2)


@condition('NIfTI with voxels of .0015 mm', 'error: its voxels are')
def _(folder, hu, A): nifti(folder, hu, A, change=np.eye(3)*.0015/2)


@condition('NIfTI of HU + 1024', '1024 above')
def _(folder, hu, A): nifti(folder, hu + np.int16(1024), A)


@condition('NIfTI of signed values as uint16', 'values are signed')
def _(folder, hu, A): nifti(folder, hu.view('u2'), A)


@condition('pixels of a hundredth of a millimetre', 'error: pixel spacing of')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    each(folder, lambda ds, k: setattr(ds, 'PixelSpacing', ['.0019', '.0019']))


# one volume, whatever alternates in its headers or positions

@condition('rounded positions are one volume', 'uneven spacing')
def _(folder, hu, A):
    B = A.copy()
    B[:3, 0] *= 1.5/np.linalg.norm(A[:3, 0])
    write_series(hu, B, folder, uid='1.2.3')
    each(folder, lambda ds, k: setattr(ds, 'ImagePositionPatient', [f'{float(v):.0f}' for v in ds.ImagePositionPatient]))
    return 'evened'


@condition('two rows of a detector that count acquisitions in turn')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    each(folder, lambda ds, k: setattr(ds, 'AcquisitionNumber', 1 + k % 2))


@condition('a thickness that is written in two ways')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    each(folder, lambda ds, k: setattr(ds, 'SliceThickness', ('2.00', '2.01')[k % 2]))


# which series

def beside(folder, hu, A, number, n=40, **says):
    at = folder/f's{number}'
    write_series(hu[:n], A, at, uid='1.2.3', series=dict(SeriesNumber=number, SeriesInstanceUID=f'1.2.3.4.{number}') | says)


@condition('a multi-energy study', 'not in Hounsfield units')
def _(folder, hu, A):
    for k, kind in enumerate(('MGML', 'Z_EFF', 'EDW', 'HU', 'PCT')): beside(folder, hu if kind == 'HU' else hu[::-1], A, k + 1, RescaleType=kind)


for _good, _bad in (('HEADNECK', 'CHEST'), ('HALSWIRBELSAEULE', 'BRUSTWIRBELSAEULE'), ('Halswirbelsäule', 'Brustwirbelsäule'), ('HWS', 'BWS'), ('CSPINE', 'TSPINE'), ('CERVICAL', 'CERVIX'),
                    ('RACHIS CERVICAL', 'RACHIS DORSAL'), ('COLUMNA CERVICAL', 'COLUMNA LUMBAR'), ('COLUNA CERVICAL', 'TÓRAX'), ('COLLO', 'TORACE'), ('NEK', 'BUIK'), ('COU', 'CRÂNE'), ('C1-C7', 'FEMORAL NECK'),
                    ('KopfHals', 'Schenkelhals'), ('cuello', 'cuello femoral'), ('craniocervical', 'Tórax')):
    def _(folder, hu, A, good=_good, bad=_bad):
        # the name may stand in a description, where umlauts are allowed
        beside(folder, hu[::-1], A, 1, SeriesDescription=bad, SpecificCharacterSet='ISO_IR 192' if bad == 'Tórax' else 'ISO_IR 100')
        beside(folder, hu, A, 2, n=30, SeriesDescription=good, SpecificCharacterSet='ISO_IR 100')
        return hu[:30]
    CONDITIONS[f'{_good} beside {_bad}'] = _, 'more than one series'


@condition('a secondary capture with a geometry and a rescale')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    def change(ds, k): ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.7'
    each(folder, change)


# containers that lie

def set_syntax(path, uid):
    """Another transfer syntax in the file's meta group, and nothing else."""
    raw = path.read_bytes()
    i = raw.index(b'\2\0\x10\0UI')
    n = struct.unpack_from('<H', raw, i + 6)[0]
    value = uid.encode() + b'\0'*(len(uid) % 2)
    meta = raw[144:i + 6] + struct.pack('<H', len(value)) + value + raw[i + 8 + n:]
    length = struct.unpack_from('<I', raw, 140)[0] + len(value) - n
    path.write_bytes(raw[:140] + struct.pack('<I', length) + meta)


def drop_meta(path, only_syntax=False):
    """The file without its meta group and preamble, or without its transfer syntax."""
    raw = path.read_bytes()
    if only_syntax:
        i = raw.index(b'\2\0\x10\0UI')
        n = 8 + struct.unpack_from('<H', raw, i + 6)[0]
        path.write_bytes(raw[:140] + struct.pack('<I', struct.unpack_from('<I', raw, 140)[0] - n) + raw[144:i] + raw[i + n:])
    else: path.write_bytes(raw[144 + struct.unpack_from('<I', raw, 140)[0]:])


def pixels(path, make):
    """Another element of pixels, made of the one there: `make(value)` is the whole of it."""
    raw = path.read_bytes()
    i = raw.rindex(b'\xe0\x7f\x10\0O')
    path.write_bytes(raw[:i] + make(raw[i + 12:]))


def insert(path, element, before=b'\x28\0\x02\0US'):
    """An element, as bytes, before another."""
    raw = path.read_bytes()
    i = raw.index(before)
    path.write_bytes(raw[:i] + element + raw[i:])


for _vr in (b'SV', b'UV'):
    def _(folder, hu, A, vr=_vr):
        write_series(hu, A, folder, uid='1.2.3')
        for p in files(folder): insert(p, b'\x21\0\x01\x10' + vr + struct.pack('<H', 8) + bytes(8))
    CONDITIONS[f'{_vr.decode()} with a length of 16 bits'] = _, ''

for _syntax in ('explicit', 'implicit', 'jpeg_lossless', 'jpeg2000', 'jpegls', 'rle'):
    def _(folder, hu, A, syntax=_syntax):
        write_series(hu, A, folder, uid='1.2.3', syntax=syntax)
        for p in files(folder): drop_meta(p, only_syntax=True)
    CONDITIONS[f'no transfer syntax, {_syntax.replace("_", " ")}'] = _, '' if _syntax in ('explicit', 'implicit') else 'no transfer syntax, but'


@condition('a compressed syntax over native pixels', 'but native pixels')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    for p in files(folder): set_syntax(p, SYNTAXES['jpeg_lossless'])


@condition('an uncompressed syntax over JPEG Lossless', 'pixels in JPEG')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3', syntax='jpeg_lossless')
    for p in files(folder): set_syntax(p, SYNTAXES['explicit'])


@condition('JPEG 2000 under the syntax of JPEG Lossless', 'pixels in JPEG2000')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3', syntax='jpeg2000')
    for p in files(folder): set_syntax(p, SYNTAXES['jpeg_lossless'])


HEAD, UNDEFINED = b'\xe0\x7f\x10\0OB\0\0', b'\xff\xff\xff\xff'
END = b'\xfe\xff\xdd\xe0\0\0\0\0'


@condition('native pixels of undefined length', 'native pixels of undefined length')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    for p in files(folder): pixels(p, lambda v: b'\xe0\x7f\x10\0OW\0\0' + UNDEFINED + v + END)


@condition('native pixels in an item', 'native pixels of undefined length')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    for p in files(folder): pixels(p, lambda v: HEAD + UNDEFINED + b'\xfe\xff\0\xe0' + bytes(4) + b'\xfe\xff\0\xe0' + struct.pack('<I', len(v)) + v + END)


for _syntax in ('jpeg_lossless', 'jpeg2000', 'rle'):
    def _(folder, hu, A, syntax=_syntax):
        write_series(hu, A, folder, uid='1.2.3', syntax=syntax)
        for p in files(folder): pixels(p, lambda v: HEAD + UNDEFINED + v[12:])   # without the table's item, which holds one offset
    CONDITIONS[f'no item for the offset table, {_syntax.replace("_", " ")}'] = _, 'no item for the table'


@condition('JPEG with a defined length, bare', 'pixels in JPEG')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3', syntax='jpeg_lossless')
    for p in files(folder):
        stream = next(generate_frames(pydicom.dcmread(p).PixelData, number_of_frames=1))
        pixels(p, lambda v, s=stream: HEAD + struct.pack('<I', len(s)) + s)


@condition('JPEG with a defined length, in its items', 'defined length')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3', syntax='jpeg_lossless')
    for p in files(folder): pixels(p, lambda v: HEAD + struct.pack('<I', len(v) - 8) + v[:-8])


for _group in (3, 5):
    def _(folder, hu, A, group=_group):
        write_series(hu, A, folder, uid='1.2.3')
        for p in files(folder):
            drop_meta(p)
            p.write_bytes(struct.pack('<HH', group, 0x10) + b'LO' + struct.pack('<H', 4) + b'ACME' + p.read_bytes())
    CONDITIONS[f'no preamble, group {_group} first'] = _, ''


def move(path, tags, behind):
    """Elements of an explicit little-endian file put behind the pixels, or before all others."""
    ds = pydicom.dcmread(path)
    late = Dataset()
    for t in tags:
        late[t] = ds[t]
        del ds[t]
    ds.save_as(path)
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset
    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, False
    write_dataset(out, late)
    raw, more = path.read_bytes(), out.getvalue()
    at = len(raw) if behind else 144 + struct.unpack_from('<I', raw, 140)[0]
    path.write_bytes(raw[:at] + more + raw[at:])


@condition('rescale behind the pixels', 'behind the pixels')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    for p in files(folder): move(p, ['RescaleSlope', 'RescaleIntercept'], True)


@condition('position behind compressed pixels', 'behind the pixels')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3', syntax='rle')
    for p in files(folder): move(p, ['ImagePositionPatient', 'RescaleIntercept'], True)


@condition('elements out of order')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    for p in files(folder): move(p, ['RescaleSlope', 'RescaleIntercept', 'Rows', 'BitsStored'], False)


@condition('the header in the other encoding than the syntax says')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3', syntax='implicit')
    for p in files(folder): set_syntax(p, ExplicitVRLittleEndian)


# numbers as text

def text(folder, hu, A, change, names):
    """Decimal strings of every file, changed as text."""
    write_series(hu, A, folder, uid='1.2.3', syntax='implicit')
    for p in files(folder):
        raw = p.read_bytes()
        for tag in names:
            i = raw.index(struct.pack('<HH', *divmod(tag, 1 << 16)), 132)
            n = struct.unpack_from('<I', raw, i + 4)[0]
            value = change(raw[i + 8:i + 8 + n].decode().strip(' \0')).encode()
            value += b' '*(len(value) % 2)
            raw = raw[:i + 4] + struct.pack('<I', len(value)) + value + raw[i + 8 + n:]
        p.write_bytes(raw)


def comma(v): return '\\'.join(f'{float(x):.4f}'.replace('.', ',') for x in v.split('\\'))


@condition('a decimal comma in every number', 'decimal comma')
def _(folder, hu, A): text(folder, hu, A, comma, [0x00200032, 0x00200037, 0x00280030, 0x00281052, 0x00281053, 0x00180050])


@condition('a decimal comma in every other position', 'decimal comma')
def _(folder, hu, A):
    n = iter(range(1000))
    text(folder, hu, A, lambda v: comma(v) if next(n) % 2 else v, [0x00200032])


@condition('a decimal comma in an enhanced file', 'decimal comma')
def _(folder, hu, A):
    write_series(hu, A, folder, uid='1.2.3')
    path = write_enhanced(folder)
    raw, i = bytearray(path.read_bytes()), 0
    while (i := raw.find(b'\x20\0\x32\0DS', i + 1)) > 0:
        n = struct.unpack_from('<H', raw, i + 6)[0]
        raw[i + 8:i + 8 + n] = raw[i + 8:i + 8 + n].replace(b'.', b',')
    path.write_bytes(raw)


@condition('positions of whole millimetres beside exact slice locations', 'whole millimetres')
def _(folder, hu, A):
    B = A.copy()
    B[:3, 0] *= .625/np.linalg.norm(A[:3, 0])
    write_series(hu, B, folder, uid='1.2.3')
    def change(ds, k):
        at = [float(v) for v in ds.ImagePositionPatient]
        ds.SliceLocation, ds.ImagePositionPatient = f'{at[2]:.3f}', [round(v) for v in at]
    each(folder, change)


