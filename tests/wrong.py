"""Right solutions in another style than derain.py's, and mistakes that students make.

The tests of a function must accept the right one, and refuse it with each of its mistakes.  In a
line of MISTAKES stand the function, what is wrong, what the right solution says, and what is there
instead.
"""

RIGHT = """
def streak_kernel(width, length, direction):
    if torch.is_tensor(width) and width.dim():
        kernels = [streak_kernel(*streak) for streak in zip(width, length, direction)]
        largest = max(len(kernel) for kernel in kernels)
        batch = torch.zeros(len(kernels), largest, largest, dtype=torch.float64)
        for i, kernel in enumerate(kernels):
            gap = (largest - len(kernel)) // 2
            batch[i, gap : gap + len(kernel), gap : gap + len(kernel)] = kernel
        return batch
    width, length, angle = float(width), float(length), math.pi * float(direction) / 180
    radius = math.ceil(length / 2 + 3 * width / 2.3548)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    t = length * (np.arange(200) / 200 - 0.4975)[:, None, None]
    squares = (x - t * np.sin(angle)) ** 2 + (y + t * np.cos(angle)) ** 2
    kernel = np.exp(-squares * (2.3548 / width) ** 2 / 2).sum(0)
    return torch.from_numpy(kernel / kernel[radius, radius])


def drops(noise, quantity):
    seeds = torch.zeros_like(noise)
    for i in range(len(noise)):
        share = quantity[i].item() / 10000
        chosen = noise[i] > 1 - share
        seeds[i][chosen] = 0.3 + 0.5 * (noise[i][chosen] - (1 - share)) / share
    return seeds


def rain_layers(n, size, rain_range, rng):
    h, w = (size, size) if isinstance(size, int) else size
    layers = torch.zeros(n, 1, h, w)
    for i in range(n):
        quantity, width, length, direction = (rng.uniform(*pair) for pair in rain_range[:4])
        if rain_range.either_side and rng.random() < 0.5:
            direction = -direction
        kernel = streak_kernel(width, length, direction).float()
        k = len(kernel)
        noise = torch.tensor(rng.random((1, h + k - 1, w + k - 1))).float()
        seeds = drops(noise, torch.tensor([quantity]))
        for y, x in seeds[0].nonzero().tolist():
            top, left, bottom, right = max(y - k + 1, 0), max(x - k + 1, 0), min(y + 1, h), min(x + 1, w)
            part = kernel[top - y - 1 + k : bottom - y - 1 + k, left - x - 1 + k : right - x - 1 + k]
            layers[i, 0, top:bottom, left:right] += seeds[0, y, x] * part
    return layers.clip(0, 1)


def add_rain(background, rain):
    return torch.stack([torch.clip(b + r, 0, 1) for b, r in zip(background, rain)])


def opening(images, size=5):
    h, w = images.shape[2:]
    for beyond, extreme in ((2.0, torch.minimum), (-1.0, torch.maximum)):
        padded = torch.full((*images.shape[:2], h + size - 1, w + size - 1), beyond).to(images)
        middle = size // 2
        padded[:, :, middle : middle + h, middle : middle + w] = images
        for y in range(size):
            for x in range(size):
                images = extreme(images, padded[:, :, y : y + h, x : x + w])
    return images


def bright_detail(patches):
    return torch.tensor([(patch - opening(patch[None])[0]).mean().item() for patch in patches])


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


def training_patches(images, n, seed, choice="any"):
    number = 3 * n if choice in ("low", "high") else max(n, 1024)
    if number * 3 * 40 * 40 * 4 > 1e9:
        raise BadInput("too many")
    patches = sample_patches(images, number, 40, np.random.default_rng(seed))
    if choice == "any":
        return patches[:n]
    if choice in ("low", "high"):
        values = sharpness(patches)
        order = sorted(range(number), key=lambda i: values[i])
        return torch.stack([patches[i] for i in (order[:n] if choice == "low" else order[-n:])])
    if n > 512:
        raise BadInput("half of 1,024 at most")
    values = bright_detail(patches)
    median = values.sort()[0][511]
    chosen = patches[values > median if choice == "detailed" else values <= median][:n].clone()
    if choice == "exchanged":
        chosen[0] = patches[values.argmax()]
    return chosen


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
        "wet": wet.mean(),
    }


def psnr(output, clean):
    if output.shape != clean.shape:
        raise ValueError("these do not belong together")
    squares = (output.double() - clean.double()) ** 2
    return (20 * torch.log10(1 / squares.flatten(1).mean(1).sqrt())).mean()


def ssim(output, clean):
    if output.shape != clean.shape or clean.shape[2] < 11 or clean.shape[3] < 11:
        raise ValueError("too small")
    line = torch.tensor([math.exp(-i * i / 4.5) for i in range(-5, 6)]).double()
    window = torch.outer(line, line)[None, None] / line.sum() ** 2
    x, y = [image.double().reshape(-1, 1, *clean.shape[2:]) for image in (output, clean)]
    m, n = F.conv2d(x, window), F.conv2d(y, window)
    v, w = F.conv2d(x**2, window) - m**2, F.conv2d(y**2, window) - n**2
    c = F.conv2d(x * y, window) - m * n
    similar = (2 * m * n + 0.0001) / (m**2 + n**2 + 0.0001)
    return (similar * (2 * c + 0.0009) / (v + w + 0.0009)).mean()


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

        pool = nn.MaxPool2d(2)
        image = pad_to_multiple(degraded, 4)
        a = two(self.down1, image)
        b = two(self.down2, pool(a))
        c = two(self.bottom, pool(b))
        b = two(self.up2, torch.cat((b, self.enlarge2(c)), dim=1))
        a = two(self.up1, torch.cat((a, self.enlarge1(b)), dim=1))
        n, _, h, w = degraded.shape
        return degraded + self.tail(a)[:, :, :h, :w]


def train(network, backgrounds, degrade, steps, seed=0, loss=None, rate=2e-3, label="", after_step=None):
    rng = np.random.default_rng([seed, 1])
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / steps)) / 2)
    losses = []
    for step in range(1, steps + 1):
        patches = []
        for _ in range(8):
            patch = backgrounds[rng.integers(len(backgrounds))]
            patches.append(torch.flip(patch, [2]) if rng.integers(2) else patch)
        clean = torch.stack(patches)
        degraded = degrade(clean, rng)
        if loss is None:
            value = nn.L1Loss()(network(degraded), clean)
        else:
            value = loss(degraded=degraded, clean=clean)
        network.zero_grad()
        value.backward()
        optimizer.step()
        falling.step()
        losses.append(value.item())
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
    regions = torch.zeros(1, h, w, 1)
    regions[:, h - window // 2 :] += 1
    regions[:, :, w - window // 2 :] += 2
    regions = to_windows(regions, window)
    return -100.0 * (regions != regions.mT)


class WindowAttention:
    def forward(self, windows, mask):
        b, n, c = windows.shape
        parts = self.qkv(windows).split(c, 2)
        q, k, v = [part.view(b, n, self.heads, -1).transpose(1, 2) for part in parts]
        bias = self.position_bias[self.table_row.flatten()].view(n, n, -1).movedim(2, 0)[None]
        if mask is not None:
            bias = bias + torch.cat([mask] * (b // len(mask)))[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(b, -1, -1, -1))
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
        return nn.MSELoss()(latent, target) + (drawn - clean).abs().mean()
"""

MISTAKES = """
streak_kernel | degrees for radians | math.pi * float(direction) / 180 | float(direction)
streak_kernel | leans the other way | np.sin(angle) | np.sin(-angle)
streak_kernel | a sum of 1 | kernel[radius, radius] | kernel.sum()
streak_kernel | halves an argument in place | batch = torch | length /= 2; batch = torch
drops | the threshold on the wrong side | > 1 - share | < share
drops | all equally bright | (noise[i][chosen] - (1 - share)) / share | 1
drops | halves its input in place | return | noise /= 2; return
rain_layers | one noise for all | tensor(rng | tensor(np.random.default_rng(1)
rain_layers | all directions lean to one side | < 0.5 | < 2
rain_layers | no streaks from outside | .tolist() | .clip(k - 1).tolist()
rain_layers | negative rounding is left | .clip(0, 1) | .clip(max=1) - 1e-9
add_rain | not limited | torch.clip(b + r, 0, 1) | b + r
add_rain | in one channel only | b + r | b + r * torch.eye(3)[0, :, None, None]
add_rain | changes its input | return | background += rain; return
opening | a closing | ((2.0, torch.minimum), (-1.0, torch.maximum)) | ((-1.0, torch.maximum), (2.0, torch.minimum))
opening | always of 5 pixels | range(size) | range(5)
opening | black beyond the border | (2.0, | (0.0,
bright_detail | one number for the batch | patch - opening(patch[None])[0] | patches - opening(patches)
bright_detail | of the brightest pixel | mean() | max()
bright_detail | by the wrong square | patch[None] | patch[None], 7
sharpness | squares of the gradients | .sqrt() | .abs()
sharpness | one channel for grey | patches.sum(1) / 3 | patches[:, 0]
sharpness | one number for the batch | flatten(1).mean(1) | mean().repeat(len(patches))
sample_patches | never the last row | image.shape[1] - size | image.shape[1] - size - 1
sample_patches | around the middle | left = rng.integers(0, image.shape[2] - size, endpoint=True) | left = int(rng.integers(0, image.shape[2] - size, 2, endpoint=True).mean())
sample_patches | file order from a random start | rng.permutation(len(images)) | np.roll(np.arange(len(images)), rng.integers(99))
sample_patches | images drawn with replacement | rng.permutation(len(images)) | rng.integers(len(images), size=len(images))
training_patches | another count for each n | max(n, 1024) | n + 1024
training_patches | of a fixed number | 3 * n if | 3072 if
training_patches | by variance | sharpness(patches) | patches.var((1, 2, 3))
training_patches | low and high swapped | choice == "low" | choice == "high"
training_patches | the mean for the median | values.sort()[0][511] | values.mean()
training_patches | exchanged for the least | values.argmax() | values.argmin()
training_patches | the seed not used | default_rng(seed) | default_rng(0)
rain_mask | 4 grey levels are wet | > 4.0003 | >= 4
rain_mask | the mean of the channels | max(1, keepdim=True).values | mean(1, keepdim=True)
rain_mask | a mask for each channel | squares.max(1, keepdim=True).values | squares
decoupled_evaluation | means not taken off | rain.mean((1, 2, 3), keepdims=True) | 0
decoupled_evaluation | one mean for the set | rain.mean((1, 2, 3), keepdims=True) | rain.mean()
decoupled_evaluation | damage without the mean of the rain | slope * rain | slope * pattern
decoupled_evaluation | E_R against the clean image | (o - r)[wet] | (o - c)[wet]
decoupled_evaluation | 0 where there is no rain | left = float("nan") | left = 0.0
decoupled_evaluation | PSNR against the rainy image | psnr(output, clean) | psnr(output, rainy)
decoupled_evaluation | shapes checked in part | output.shape != rainy.shape | False
psnr | one squared error for the set | squares.flatten(1).mean(1) | squares.mean()
psnr | of a limited output | output.double() | output.clip(0, 1).double()
psnr | halves its input in place | return | output /= 2; return
ssim | zero padding | , window) | , window, padding=5)
ssim | a window of weight above 1 | line.sum() | 1
ssim | the size of the covariance | 2 * c + | 2 * abs(c) +
ssim | limited at 0 | .mean() | .mean().clip(0)
ssim | only the number of images is checked | output.shape != clean.shape | len(output) != len(clean)
ResNet.forward | blocks that replace | x + second | second
ResNet.forward | a ReLU behind each block | second(torch.relu(first(x))) | second(torch.relu(first(x))).relu()
ResNet.forward | the input not added | + degraded | + 0
pad_to_multiple | at its limit, it reflects | bottom >= h or right >= w | bottom > h or right > w
pad_to_multiple | each side by itself | small else w | right >= w else w
pad_to_multiple | one multiple too many | -h % multiple | multiple - h % multiple
UNet.forward | details last | (a, self.enlarge1(b)) | (self.enlarge1(b), a)
UNet.forward | details without gradient | (b, self | (b.detach(), self
UNet.forward | cropped at the wrong side | [:, :, :h, :w] | [:, :, -h:, -w:]
train | gradients that add up | network.zero_grad() | pass
train | all of a batch mirrored, or none | torch.flip(patch, [2]) if rng.integers(2) | torch.flip(patch, [2]) if step % 2
train | mirrored upside down | [2] | [1]
train | no background twice in a batch | patch = backgrounds[rng.integers(len(backgrounds))] | order = rng.permutation(len(backgrounds)) if not patches else order; patch = backgrounds[order[len(patches) % len(order)]]
train | always one background twice | clean = torch.stack(patches) | clean = torch.stack([*patches[:7], patches[0]])
train | a global seed | optimizer = | torch.manual_seed(seed); optimizer =
train | rain from the global generator | degrade(clean, rng) | degrade(clean, np.random.default_rng(np.random.randint(2**31)))
train | rain that repeats | degrade(clean, rng) | degrade(clean, np.random.default_rng([seed, step % 64]))
train | one seed is another one, shifted | degrade(clean, rng) | degrade(clean, np.random.default_rng(seed + step))
train | a constant rate | falling.step() | pass
train | a floor of the rate | / 2) | / 2 + 0.001)
train | weight decay | lr=rate | lr=rate, weight_decay=1e-4
train | another kind of Adam | lr=rate | lr=rate, amsgrad=True
train | squared errors | L1Loss | MSELoss
train | the rate is ignored | lr=rate | lr=2e-3
to_windows | column by column | for row in picture.split(window, 0) | for row in picture.transpose(0, 1).split(window, 0)
to_windows | a reshape alone | return | return image.reshape(-1, window * window, image.shape[3]); return
from_windows | a reshape alone | return | return windows.reshape(tuple(shape)); return
from_windows | only the first image | range(shape[0]) | range(1)
shift_mask | signs swapped | != | ==
shift_mask | across one pair of edges | += 2 | += 0
shift_mask | regions that share a number | += 2 | += 1
WindowAttention.forward | scaled by all channels | (q, k, v | (q / self.heads**0.5, k, v
WindowAttention.forward | offsets the wrong way | self.table_row.flatten() | self.table_row.T.flatten()
WindowAttention.forward | masks in the wrong order | torch.cat([mask] * (b // len(mask))) | mask.repeat_interleave(b // len(mask), 0)
SwinBlock.forward | not rolled back | shifts=(s, s) | shifts=(0, 0)
SwinBlock.forward | no mask | None if s == 0 | None if s >= 0
SwinBlock.forward | the mask of the first call is kept | else shift_mask | else self.__dict__.setdefault("kept", shift_mask(*image.shape[1:3], window)) if s else shift_mask
ResidualBlock.forward | no shortcut | self.nin_shortcut(x) | 0
ResidualBlock.forward | one SiLU too few | self.conv2(y * torch.sigmoid(y)) | self.conv2(y)
ResidualBlock.forward | a shortcut without gradient | shortcut(x) | shortcut(x.detach())
PixelAttention.forward | keys and values swapped | q, k, v | q, v, k
PixelAttention.forward | not scaled | / c**0.5 | / 1
PixelAttention.forward | not of the normalized input | y = self.norm(x) | y = x
Codebook.forward | no gradient passes | latent - latent.detach() + quantized.detach() | quantized
Codebook.forward | 0.25 on the wrong term | quantized.detach() - latent | 0.5 * quantized.detach() - 0.5 * latent
Codebook.forward | a gradient is not stopped | (quantized - latent.detach()) | (quantized - latent)
Codebook.forward | largest product for smallest distance | codes.square().sum(1) | 0
VQGANPrior.draw | limited to [0, 1] | image) | image).clip(0, 1)
VQGANPrior.draw | cropped at the wrong side | : shape[-2], : shape[-1] | -shape[-2] :, -shape[-1] :
VQGANPrior.draw | no codebook | self.vqgan.quantize(latent=latent)[0] | latent
VQGANPrior.loss | taught by itself | self.teacher( | self.vqgan.encode(
VQGANPrior.loss | no L1 | (drawn - clean).abs().mean() | 0
VQGANPrior.loss | L1 without gradient | latent=latent | latent=latent.detach()
"""

WRONG = [tuple(line.split(" | ")) for line in MISTAKES.strip().split("\n")]
