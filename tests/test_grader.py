"""Coursework: blanks are blank and nothing else; right solutions pass, wrong ones are caught."""

import ast
import subprocess
import sys

import pytest
from _pytest.runner import runtestprotocol

import derain
from conftest import ROOT
from grader import BLANK, FUNCTIONS, MARKS, TESTS, marks_of
from make_assignment import ASSIGNMENTS, blank, others, page_of, write_handout
from wrong import SOURCE, WRONG, find, put, source_of

FILES = ("rain", "evaluation", "backgrounds", "training", "networks", "vqgan")  # that grade
TEXT = SOURCE.read_text("utf-8")
NAMES = sorted({name for names in ASSIGNMENTS.values() for name in names})

# Right solutions that are written another way.  The first of decoupled_evaluation needs no helpers.
RIGHT = """
def streak_kernel(width, length, direction):
    streaks = [torch.atleast_1d(as_tensor(v)).double() for v in (width, length, direction)]
    radius = ceil(max(streaks[1] / 2 + 3 * streaks[0] / 2.3548))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    kernels = []
    for w, l, degrees in zip(*(v.tolist() for v in streaks)):
        t = l * (np.arange(200) / 200 - 0.4975)[:, None, None]
        angle = pi * degrees / 180
        squares = (x - t * np.sin(angle)) ** 2 + (y + t * np.cos(angle)) ** 2
        kernel = np.exp(-squares * (2.3548 / w) ** 2 / 2).sum(0)
        kernels.append(torch.tensor(kernel / kernel[radius, radius], dtype=torch.float32))
    return torch.stack(kernels) if torch.is_tensor(width) else kernels[0]


def streak_seeds(noise, quantity):
    seeds = torch.zeros_like(noise)
    for i in range(len(noise)):
        share = quantity[i].item() / 10000
        chosen = noise[i] > 1 - share
        seeds[i][chosen] = 0.3 + 0.5 * (noise[i][chosen] - (1 - share)) / share
    return seeds


def rain_layers(n, size, rain_range, rng):
    h, w = (size, size) if isinstance(size, int) else size
    drawn = [rng.uniform(*rain_range[i], n) for i in range(4)]
    if rain_range.either_side:
        drawn[3] = drawn[3] * rng.choice([-1, 1], n)
    quantity, *streaks = [torch.tensor(values).float() for values in drawn]
    kernel = streak_kernel(*streaks)
    canvas = [16 * ceil((side + len(kernel[0]) - 1) / 16) for side in (h, w)]
    seeds = streak_seeds(torch.from_numpy(rng.random((n, *canvas), dtype=np.float32)), quantity)
    rain = conv2d(seeds[None], kernel.flip(1, 2)[:, None], groups=n)
    return torch.clip(rain[0, :, None, :h, :w], 0, 1)


def add_rain(background, rain):
    return torch.stack([torch.clip(b + r, 0, 1) for b, r in zip(background, rain)])


def rain_mask(rainy, clean):
    squares = (255 * (rainy.double() - clean.double())) ** 2
    return squares.max(1, keepdim=True).values > 4.0003**2


def decoupled_evaluation(output, rainy, clean):
    if output.shape != rainy.shape or rainy.shape != clean.shape:
        raise ValueError("these do not belong together")
    o, r, c = [image.numpy().astype(np.float64) * 255 for image in (output, rainy, clean)]
    wet = np.repeat(rain_mask(rainy, clean).numpy(), 3, axis=1)
    rain = r - c
    pattern = rain - rain.mean((1, 2, 3), keepdims=True)

    def rms(x):
        return float(np.sqrt((x**2).mean())) if x.size else float("nan")

    slope = left = 0.0
    if wet.any() and (abs(pattern) > 1e-3).any():
        slope = left = float((pattern * (o - c)).sum() / (pattern**2).sum())
    else:
        left = float("nan")
    try:
        similar = ssim(output, clean)
    except ValueError:
        similar = float("nan")
    return {
        "ssim": similar,
        "psnr": psnr(output, clean),
        "E_B": rms((o - c)[~wet]),
        "E_R": rms((o - r)[wet]),
        "damage": rms(o - c - slope * rain),
        "rain_left": 100 * left,
    }


def psnr(output, clean):
    if output.shape != clean.shape:
        raise ValueError("these do not belong together")
    values = []
    for x, y in zip(output.numpy(), clean.numpy()):
        mse = np.mean((x.astype(np.float64) - y) ** 2)
        values.append(20 * np.log10(1 / np.sqrt(mse)) if mse > 0 else inf)
    return float(np.mean(values))


def ssim(output, clean):
    if output.shape != clean.shape or clean.shape[2] < 11 or clean.shape[3] < 11:
        raise ValueError("too small")
    line = torch.tensor([exp(-as_tensor(i * i) / 4.5) for i in range(-5, 6)]).double()
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = [image.double().reshape(-1, 1, *clean.shape[2:]) for image in (output, clean)]
    m, n = conv2d(x, window), conv2d(y, window)
    v, w = conv2d(x**2, window) - m**2, conv2d(y**2, window) - n**2
    c = conv2d(x * y, window) - m * n
    similar = (2 * m * n + 0.0001) / (m**2 + n**2 + 0.0001)
    return (similar * (2 * c + 0.0009) / (v + w + 0.0009)).mean().item()


def sharpness(patches):
    grey = patches.sum(1) / 3
    corner = grey[:, :-1, :-1]
    squares = (grey[:, 1:, :-1] - corner) ** 2 + (grey[:, :-1, 1:] - corner) ** 2
    return squares.sqrt().flatten(1).mean(1)


def sample_patches(images, n, size, rng):
    chosen = []
    while len(chosen) < n:
        chosen += rng.permutation(len(images)).tolist()
    patches = torch.zeros(n, 3, size, size, dtype=images[0].dtype)
    for i in range(n):
        image = images[chosen[i]]
        if min(image.shape[1:]) < size:
            raise ValueError("an image is smaller than a patch")
        left = rng.integers(0, image.shape[2] - size, endpoint=True)
        top = rng.integers(0, image.shape[1] - size, endpoint=True)
        patches[i] = image[:, top : top + size, left : left + size]
    return patches


def training_patches(images, n, seed, third="any"):
    if max(n, 1024) * (1 if third == "any" else 3) * 19200 > 1e9:
        raise BadInput("too many")
    rng = np.random.default_rng(seed)
    if third == "any":
        return sample_patches(images, max(n, 1024), 40, rng)[:n]
    patches = list(sample_patches(images, 3 * n, 40, rng))
    patches.sort(key=lambda patch: sharpness(patch[None]).item())
    return torch.stack(patches[:n] if third == "low" else patches[-n:])


class ResNet:
    def forward(self, degraded):
        x = self.head(degraded)
        for first, _, second in self.body:
            x = x + second(torch.relu(first(x)))
        return self.tail(x) + degraded


def pad_to_multiple(images, multiple):
    h, w = images.shape[-2:]
    bottom, right = -h % multiple, -w % multiple
    small = bottom >= h or right >= w
    rows = [*range(h), *(h - 1 if small else h - 2 - i for i in range(bottom))]
    columns = [*range(w), *(w - 1 if small else w - 2 - i for i in range(right))]
    return images[..., rows, :][..., columns]


class UNet:
    def forward(self, degraded):
        def two(block, x):
            return block[2](block[0](x).relu()).relu()

        pool = torch.nn.MaxPool2d(2)
        image = pad_to_multiple(degraded, 4)
        a = two(self.down1, image)
        b = two(self.down2, pool(a))
        c = two(self.bottom, pool(b))
        b = two(self.up2, torch.cat((b, self.enlarge2(c)), dim=1))
        a = two(self.up1, torch.cat((a, self.enlarge1(b)), dim=1))
        n, _, h, w = degraded.shape
        return degraded + self.tail(a)[:, :, :h, :w]


def train(network, backgrounds, degrade, steps, seed=0, label="", after_step=None):
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=getattr(network, "rate", 2e-3))
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + cos(pi * i / steps)) / 2)
    losses = []
    for step in range(1, steps + 1):
        patches = []
        for _ in range(8):
            patch = backgrounds[rng.integers(len(backgrounds))]
            patches.append(torch.flip(patch, [2]) if rng.integers(2) else patch)
        clean = torch.stack(patches)
        degraded = degrade(clean, np.random.default_rng(seed + step))
        if hasattr(network, "loss"):
            loss = network.loss(degraded=degraded, clean=clean)
        else:
            loss = torch.nn.L1Loss()(network(degraded), clean)
        network.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step)
    return losses


def to_windows(image, window):
    windows = []
    for picture in image:
        for row in picture.split(window, 0):
            windows += [part.reshape(-1, image.shape[3]) for part in row.split(window, 1)]
    return torch.stack(windows)


def from_windows(windows, window, shape):
    image = windows.new_zeros(tuple(shape))
    i = 0
    for n in range(shape[0]):
        for y in range(0, shape[1], window):
            for x in range(0, shape[2], window):
                image[n, y : y + window, x : x + window] = windows[i].view(window, window, -1)
                i += 1
    return image


def shift_mask(h, w, window):
    pixels = arange(h * w).view(h, w).roll((-(window // 2), -(window // 2)), (0, 1))
    pixels = to_windows(pixels[None, ..., None], window)[..., 0]
    rows, columns = pixels // w, pixels % w
    far = (rows[:, None] - rows[..., None]).abs() >= window
    far = far | ((columns[:, None] - columns[..., None]).abs() >= window)
    return -100.0 * far


class WindowAttention:
    def forward(self, windows, mask):
        b, n, c = windows.shape
        parts = self.qkv(windows).split(c, 2)
        q, k, v = [part.view(b, n, self.heads, -1).transpose(1, 2) for part in parts]
        bias = self.position_bias[self.table_row.flatten()].view(n, n, -1).movedim(2, 0)[None]
        if mask is not None:
            bias = bias + torch.cat([mask] * (b // len(mask)))[:, None]
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(b, -1, -1, -1))
        return self.project(out.transpose(1, 2).flatten(2))


class SwinBlock:
    def forward(self, image):
        s, window = self.shift, self.window
        x = torch.roll(self.norm(image), shifts=(-s, -s), dims=(1, 2))
        mask = None if s == 0 else shift_mask(image.shape[1], image.shape[2], window)
        x = from_windows(self.attention(to_windows(x, window), mask), window, tuple(image.shape))
        x = image + torch.roll(x, shifts=(s, s), dims=(1, 2))
        norm, widen, gelu, narrow = self.perceptron
        return x + narrow(gelu(widen(norm(x))))


class ResidualBlock:
    def forward(self, x):
        y = self.norm1(x)
        y = self.norm2(self.conv1(y * torch.sigmoid(y)))
        return self.conv2(y * torch.sigmoid(y)) + self.nin_shortcut(x)


class PixelAttention:
    def forward(self, x):
        n, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = [part(y).view(n, c, h * w) for part in (self.q, self.k, self.v)]
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) / c**0.5, dim=2)
        return x + self.proj_out(torch.bmm(v, weights.transpose(1, 2)).view(n, c, h, w))


class Codebook:
    def forward(self, latent):
        codes = self.embedding.weight
        vectors = latent.permute(0, 2, 3, 1)
        indices = (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(3)
        quantized = codes[indices].permute(0, 3, 1, 2)
        loss = ((quantized.detach() - latent) ** 2).mean()
        loss = loss + 0.25 * ((quantized - latent.detach()) ** 2).mean()
        return latent - latent.detach() + quantized.detach(), indices, loss


class VQGANPrior:
    def draw(self, latent, shape):
        vectors = self.vqgan.quantize(latent=latent)[0]
        image = self.vqgan.decoder(self.vqgan.post_quant_conv(vectors))
        return (0.5 + 0.5 * image)[:, :, : shape[-2], : shape[-1]]

    def loss(self, degraded, clean):
        with torch.no_grad():
            _, indices, _ = self.vqgan.quantize(latent=self.teacher(self.prepare(clean)))
            target = self.vqgan.quantize.embedding(indices).permute(0, 3, 1, 2)
        latent = self.vqgan.quant_conv(self.vqgan.encoder(self.prepare(degraded)))
        drawn = self.draw(latent=latent, shape=clean.shape)
        return torch.nn.MSELoss()(latent, target) + (drawn - clean).abs().mean()
"""


class Grading:
    """A pytest run in this process: puts in one solution after the other, and runs its tests."""

    def __init__(self):
        self.items = []
        self.seconds = {}  # how long each test takes
        self.unfair = []  # tests that refuse a right solution
        self.unasked = []  # tests that pass although their function is blank
        self.caught = []  # wrong solutions that fail

    def failing(self, items, solutions, first=True):
        """Return the names of the tests that fail with these solutions, or of the first."""
        failed = []
        with pytest.MonkeyPatch.context() as patch:
            for name, source in solutions.items():
                put(patch, derain, name, source)
            for item in items:
                reports = runtestprotocol(item, log=False)
                self.seconds.setdefault(item, sum(report.duration for report in reports))
                if any(report.failed for report in reports):
                    failed.append(item.name)
                    if first:
                        break
        return failed

    def pytest_runtestloop(self, session):
        self.items = [item for item in session.items if marks_of(item)]
        blanked = blank(TEXT, NAMES)
        blanks = {name: source_of(name, blanked) for name in NAMES}
        another = {name: source_of(name, RIGHT) for name in TESTS}
        another["decoupled_sums"] = blanks["decoupled_sums"]
        another["decoupled_measures"] = blanks["decoupled_measures"]
        for solutions in ({}, another):
            self.unfair += self.failing(self.items, solutions, first=False)

        for mark in MARKS:
            items = [item for item in self.items if mark in marks_of(item)]
            hidden = {name: blanks[name] for name in others(mark)}
            self.unfair += self.failing(items, hidden, first=False)

        for function in TESTS:
            items = [item for item in self.items if FUNCTIONS.get(item.originalname) == function]
            failed = self.failing(items, {function: blanks[function]}, first=False)
            self.unasked += {item.name for item in items} - set(failed)

        for function, mistake, old, new in WRONG:
            marks = {mark for mark in ASSIGNMENTS if function in ASSIGNMENTS[mark]}
            items = [item for item in self.items if marks & marks_of(item)]
            items.sort(key=self.seconds.get)
            source = source_of(function).replace(old, new)
            if self.failing(items, {function: source}):
                self.caught.append((function, mistake))
        return True


@pytest.fixture(scope="module")
def grading():
    found = Grading()
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in FILES]
    quiet = ["-q", "-s", "--tb=native", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    assert pytest.main([*files, *quiet], plugins=[found]) < 2  # 1: wrong solutions failed
    return found


def test_right_solutions_pass(grading):
    assert grading.unfair == []


def test_each_test_needs_its_function(grading):
    assert grading.unasked == []
    assert FUNCTIONS.keys() <= {item.originalname for item in grading.items}


@pytest.mark.parametrize("wrong", WRONG, ids=[" ".join(wrong[:2]) for wrong in WRONG])
def test_wrong_solutions_are_caught(grading, wrong):
    function, mistake, old, _ = wrong
    assert old in source_of(function), f"{function} no longer says {old!r}: mend wrong.py"
    assert (function, mistake) in grading.caught


def test_the_tables_are_in_step():
    assert set(ASSIGNMENTS) == set(MARKS)
    assert set(NAMES) == {wrong[0] for wrong in WRONG}
    for mark, names in ASSIGNMENTS.items():
        assert all(f"`{name}`" in page_of(mark) for name in names), mark


def test_blanks_are_blank_and_nothing_else_is():
    tree = ast.parse(TEXT)
    after = ast.parse(blank(TEXT, NAMES))
    for name in NAMES:
        node, blanked = find(tree, name), find(after, name)
        documented = ast.get_docstring(node)
        assert ast.get_docstring(blanked) == documented
        *docstring, only = blanked.body
        assert len(docstring) == (documented is not None)
        assert isinstance(only, ast.Raise) and f"{name} {BLANK}" in ast.unparse(only)
        node.body = blanked.body = []
    assert ast.dump(tree) == ast.dump(after)


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_a_handout_has_no_solution_but_those_that_it_needs(name, tmp_path):
    write_handout(tmp_path, name)
    files = [*tmp_path.rglob("*.py"), *tmp_path.rglob("*.md")]
    text = "".join(file.read_text("utf-8") for file in files)
    student = ast.parse((tmp_path / "derain.py").read_text("utf-8"))
    for function in [*ASSIGNMENTS[name], *others(name)]:
        assert isinstance(find(student, function).body[-1], ast.Raise), function
    assert "wrong.py" not in {file.name for file in files}
    assert str(ROOT) not in text and "instructor" not in text.lower()
    for told in ("2502.12600", "pip install -r requirements.txt", f"-m {name}", "minutes"):
        assert told in text


def command(*arguments, cwd=ROOT):
    """Run a Python program; return its status, and what it printed."""
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, cwd=cwd, text=True, capture_output=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def grade(*arguments, cwd=ROOT):
    """Run pytest; return its status, the last line, and all that it printed."""
    status, printed = command("-m", "pytest", *arguments, cwd=cwd)
    return status, printed.splitlines()[-1], printed


def test_a_handout_stands_alone(tmp_path):
    """With a blank, whose test and another one fail, and one test that is not asked for."""
    write_handout(tmp_path, "quantization")
    (tmp_path / "derain.py").write_text(blank(TEXT, ["VQGANPrior.draw"]), "utf-8")
    status, last, printed = grade("-m", "quantization", "-k", "not residual", cwd=tmp_path)
    assert status == 1 and last == "derain.py: quantization 3/6"
    assert "quantization: Codebook.forward 1/1" in printed
    assert f"VQGANPrior.draw {BLANK}" in printed and "NotImplementedError" not in printed


def test_no_points_without_passing(tmp_path):
    student = tmp_path / "eve.py"
    skips = "def psnr(*_):\n    import pytest\n\n    pytest.skip()\n"
    for source, points in (
        ("import nothing_of_the_kind", "0, as it cannot be imported"),
        (TEXT.replace(source_of("psnr"), skips), "lab 3/18"),
    ):
        student.write_text(source, "utf-8")
        status, last, _ = grade("tests/test_evaluation.py", "--module", student)
        assert status == 1 and f"eve.py: {points}" in last


def test_the_grade_is_the_same_with_and_without_the_mark(tmp_path):
    """The file has an endless loop; another test has the mark's name, but not the mark."""
    student = tmp_path / "eve.py"
    assert command("tests/make_assignment.py", "rain", "lab", "-o", student)[0] == 0
    loop = "def add_rain(background, rain):\n    while True:\n        pass\n\n\n"
    hurry = "sys.modules['tests.grader'].LIMIT = 0.5"
    student.write_text(TEXT.replace(source_of("add_rain"), loop + hurry), "utf-8")
    other = tmp_path / "test_other.py"
    other.write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('way', ['rain', 'lab'])\n"
        "def test_rain(way):\n    assert way == 'lab'\n"
    )
    with_mark = grade("-m", "rain", "--module", student)
    without = grade("tests/test_rain.py", other, "--module", student)
    assert with_mark[:2] == without[:2] and without[0] == 1
    for line in ("rain: add_rain 0/2", "rain: rain_layers 3/3", "stopped after 0.5 s"):
        assert line in without[2]


@pytest.mark.parametrize(
    "wrong",
    [
        ("rane", "-o", "x.py"),
        ("rain", "-o", "tests"),
        ("rain", "-o", "no/where.py"),
        ("rain", "lab", "-o", "folder"),
    ],
)
def test_bad_input_is_one_line(wrong):
    status, printed = command("tests/make_assignment.py", *wrong)
    assert status == 2 and printed.count("\n") == 1
