"""CLIP guidance: steering by words.

Generated from notebooks/04_clip_guidance.py, which derives and checks it: edit there, then run `make
package`.
"""

import math
import re
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from lecture26.classifier_guidance import DownPath
from lecture26.kit.validation import check_choice

# --- What belongs together ---


def cosine_similarity_matrix(image_features, text_features):
    """The cosine of the angle between each image's features and each text's.

    Args:
        image_features: (N, D), not necessarily of length 1.
        text_features: (M, D).

    Returns:
        (N, M), in [-1, 1].

    Source: Radford et al. 2021, section 2.3 and figure 3.
    """
    # S_ij = u_i . v_j / (|u_i| |v_j|)
    return F.normalize(image_features, dim=1) @ F.normalize(text_features, dim=1).T


# --- From similarities to a guess ---


def info_nce(image_features, text_features, logit_scale):
    """The symmetric contrastive loss of a batch of pairs.

    Args:
        image_features: (N, D), each of length 1; the caller has normalised them.
        text_features: (N, D), each of length 1; row i belongs to image i.
        logit_scale: tau, the logarithm of the factor kappa at the similarities; a number or scalar tensor.

    Returns:
        A scalar, at least 0: the mean of both directions, in nats.

    Raises:
        ValueError: if the features are no N >= 1 pairs of one length D.

    Source: Radford et al. 2021, section 2.3 and figure 3; van den Oord et al. 2018, equation 4.
    """
    if image_features.ndim != 2 or image_features.shape != text_features.shape or len(image_features) == 0:
        raise ValueError(
            "image_features and text_features must both have a shape (N, D), N >= 1; "
            f"got {tuple(image_features.shape)} and {tuple(text_features.shape)}"
        )
    tau = torch.as_tensor(logit_scale, dtype=image_features.dtype, device=image_features.device)
    # kappa S_ij, kappa = e^tau
    logits = tau.exp() * image_features @ text_features.T  # (N, N)
    own = torch.arange(len(logits), device=logits.device)
    # L = -1/(2N) sum_i (log p(i|i) + log q(i|i))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# --- Words to numbers ---


def split_words(text):
    """The words of a text in lower case, as a list; punctuation between words is left out.

    Hyphens and apostrophes count as parts of a word, since they stand within some.
    """
    return re.sub(r'[.,;:!?…"“”()]', " ", text.lower()).split()


class Tokenizer:
    """Turn texts into numbers, one for each word: begin, the words, end, padding.

    Args:
        words: the words there are, as `split_words` gives them, each once.
        length: L, of every row of tokens; a text has at most L - 2 words.

    Attributes:
        padding, begin, end: the numbers 0, 1 and 2; the words count from 3, in their order.
        num_tokens: how many numbers there are.

    Raises:
        ValueError: if a word appears twice or holds what no word does, or length leaves no room for a word.
    """

    padding, begin, end = 0, 1, 2

    def __init__(self, words, length):
        self.words, self.length = tuple(words), length
        if len(set(self.words)) != len(self.words):
            raise ValueError(f"words must differ; got {sorted(self.words)}")
        unfit = [word for word in self.words if split_words(word) != [word]]
        if unfit:
            raise ValueError(f"words must be in lower case, without blanks and punctuation; got {unfit}")
        if length < 3:
            raise ValueError(f"length must be at least 3, for begin, a word and end; got {length}")
        self.num_tokens = 3 + len(self.words)
        self._numbers = {word: number for number, word in enumerate(self.words, start=3)}

    def __call__(self, texts):
        """Map B texts to tokens (B, L) int64, whatever their capitals and punctuation.

        Raises:
            TypeError: if texts is a single str, or holds anything but texts.
            ValueError: if a text has a word that is not known, or too many words.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts must be a list of str; got {texts!r}")
        rows = [self._row(text) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.length)

    def _row(self, text):
        words = split_words(text)
        for word in words:
            if word not in self._numbers:
                raise ValueError(f"unknown word {word!r} in {text!r}; the words are: {', '.join(self.words)}")
        if len(words) > self.length - 2:
            raise ValueError(
                f"a text must have at most {self.length - 2} words; got {len(words)} in {text!r}"
            )
        row = [self.begin, *(self._numbers[word] for word in words), self.end]
        return row + [self.padding] * (self.length - len(row))


# --- A transformer that reads from left to right ---


def masked_attention(q, k, v, mask):
    """Mix the values by how well each query matches each key that it may look at.

    Args:
        q: queries, (..., N, d).
        k: keys, (..., M, d).
        v: values, (..., M, e).
        mask: bool, broadcastable to (..., N, M), True where query n may look at key m; each query at one at
            least.

    Returns:
        (..., N, e), a weighted mean of the values for each query.

    Source: Vaswani et al. 2017, sections 3.2.1 and 3.2.3.
    """
    # w = softmax(q k^T / sqrt(d)), where masked keys have the score -inf and so the weight 0
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., N, M)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


class TransformerBlock(nn.Module):
    """Attention among tokens, then a network for each of them; both added to their input.

    Args:
        width: length of a token's vector, a multiple of heads.
        heads: the number of attention heads.

    Raises:
        ValueError: if width is no multiple of heads.

    Source: Vaswani et al. 2017, section 3; normalised first, as in Radford et al. 2019, section 2.3.
    """

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}; got width={width}")
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h, mask):
        """Map tokens h (B, L, width) to (B, L, width); mask (L, L) says who looks at whom."""
        qkv = self.qkv(self.norm_attention(h)).unflatten(2, (3, self.heads, -1))  # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, d) each
        h = h + self.project(masked_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm_mlp(h))


def read_tokens(tokens, embed, places, blocks, norm, mask=None):
    """The features of every token of a text, each knowing the tokens that it may look at.

    Args:
        tokens: (B, L) integers.
        embed: callable, tokens -> a vector for each, (B, L, D).
        places: a vector for each place, (at least L, D).
        blocks: callables (h, mask) -> h, both (B, L, D), in their order.
        norm: callable, (B, L, D) -> (B, L, D): the last normalisation.
        mask: bool, broadcastable to (B, heads, L, L), True where token i may look at token j; with None each
            looks at itself and those before it.

    Returns:
        (B, L, D).

    Source: Radford et al. 2021, section 2.4; Radford et al. 2019, section 2.3.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)  # (L,)
    if mask is None:
        # m_ij = [j <= i]
        mask = place[:, None] >= place  # (L, L)
    h = embed(tokens) + places[place]  # (B, L, D)
    for block in blocks:
        h = block(h, mask)
    return norm(h)


class TextTransformer(nn.Module):
    """Features of every token of a text, each knowing the tokens that it may look at.

    Args:
        num_tokens: how many different tokens there are.
        length: the most tokens of a text.
        width: length of the features.
        depth: the number of blocks.
        heads: attention heads per block.

    Attributes:
        width: as given.

    Source: Radford et al. 2021, section 2.4.
    """

    def __init__(self, num_tokens, length, width=64, depth=2, heads=4):
        super().__init__()
        self.width = width
        self.tokens = nn.Embedding(num_tokens, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.01)

    def forward(self, tokens, mask=None):
        """Map tokens (B, L) to the features of each, (B, L, width); mask as `read_tokens` takes it.

        Raises ValueError if L exceeds the length.
        """
        length = self.places.num_embeddings
        if tokens.ndim != 2 or tokens.shape[1] > length:
            raise ValueError(f"tokens must be of shape (B, L), L <= {length}; got {tuple(tokens.shape)}")
        return read_tokens(tokens, self.tokens, self.places.weight, self.blocks, self.norm, mask)


def sentence_features(features, tokens, end):
    """The features at each text's end token.

    Args:
        features: of every token, (B, L, D).
        tokens: (B, L) integers.
        end: the number of the end token.

    Returns:
        (B, D): of each row, the features at its first end token.

    Raises:
        ValueError: if a row has no end token.

    Source: Radford et al. 2021, section 2.4.
    """
    if not (tokens == end).any(dim=1).all():
        raise ValueError(f"tokens must have the end token {end} in every row; got {tokens}")
    place = (tokens == end).int().argmax(dim=1)  # (B,), of the first one
    return features[torch.arange(len(tokens), device=tokens.device), place]


# --- The image tower, and the whole ---


class ImageTower(DownPath):
    """Features of whole images, clean or noisy.

    Args:
        in_channels: channels of the images.
        feature_dim: length of the features.
        patch_size, noise_aware, path: as DownPath takes them.

    Source: Nichol et al. 2022, section 4.4, for the step; the blocks are those of chapter 02.
    """

    def __init__(self, in_channels, feature_dim, patch_size=2, noise_aware=False, **path):
        super().__init__(in_channels, patch_size=patch_size, noise_aware=noise_aware, **path)
        self.head = nn.Linear(self.out_channels, feature_dim)

    def forward(self, x, t=None):
        """Map images x (B, C, H, W), noisy ones with their steps t (B,), to features (B, feature_dim).

        Raises:
            ValueError: if t is missing for noisy images, given for clean ones, or not one step per image.
        """
        return self.head(self.features(x, t).mean(dim=(2, 3)))


MAX_LOGIT_SCALE = math.log(100)


class CLIP(nn.Module):
    """An image tower and a text tower whose features agree where image and text belong together.

    Args:
        tokenizer: callable, B texts -> tokens (B, L), with `num_tokens`, `length` and `end`, see Tokenizer.
        channels: of the images.
        feature_dim: D, length of the common features.
        noise_aware: whether encode_image reads noisy images with their steps.
        image: dict of further arguments of ImageTower.
        text: dict of further arguments of TextTransformer.

    Attributes:
        tokenizer: as given.
        logit_scale: tau, the logarithm of the factor at the similarities, in [0, ln 100].

    Source: Radford et al. 2021, sections 2.3 to 2.5; Nichol et al. 2022, section 4.4 (noise-aware).
    """

    def __init__(self, tokenizer, channels=3, feature_dim=64, noise_aware=False, image=None, text=None):
        super().__init__()
        self.tokenizer = tokenizer
        self.image_tower = ImageTower(channels, feature_dim, noise_aware=noise_aware, **(image or {}))
        self.text_tower = TextTransformer(tokenizer.num_tokens, tokenizer.length, **(text or {}))
        self.text_head = nn.Linear(self.text_tower.width, feature_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, x, t=None):
        """Features (B, D), of any length, of images x (B, C, H, W) in [-1, 1], noisy ones at steps t."""
        return self.image_tower(x, t)

    def encode_text(self, tokens):
        """Features (B, D), of any length, of texts as the tokenizer's tokens (B, L)."""
        return self.text_head(sentence_features(self.text_tower(tokens), tokens, self.tokenizer.end))

    def forward(self, x, tokens, t=None):
        """What info_nce takes, for images x, tokens and steps t: normalised features and logit_scale."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        image_features = F.normalize(self.encode_image(x, t), dim=1)
        text_features = F.normalize(self.encode_text(tokens), dim=1)
        return image_features, text_features, self.logit_scale


# --- Learning it ---


def contrastive_step(optimizer, encode_image, encode_text, x, tokens, logit_scale):
    """One step of training on a batch of images and their captions.

    Args:
        optimizer: a torch.optim.Optimizer of all weights: the towers' and logit_scale.
        encode_image: callable, images x -> features (B, D), of any length.
        encode_text: callable, tokens -> features (B, D), of any length.
        x: images, (B, ...).
        tokens: of the images' captions, (B, ...).
        logit_scale: tau, a learned scalar tensor; in [0, MAX_LOGIT_SCALE] after the step.

    Returns:
        The loss before the step, a scalar without a graph.

    Source: Radford et al. 2021, section 2.3, figure 3, and section 2.5.
    """
    image_features = F.normalize(encode_image(x), dim=1)
    text_features = F.normalize(encode_text(tokens), dim=1)
    loss = info_nce(image_features, text_features, logit_scale)
    optimizer.zero_grad()
    loss.backward()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    with torch.no_grad():
        logit_scale.clamp_(0, MAX_LOGIT_SCALE)
    return loss.detach()


# --- Classes that are words ---


def zero_shot_probabilities(image_features, text_features, logit_scale):
    """Probabilities (N, K) of K classes given by a text each, (4.21).

    image_features (N, D) and text_features (K, D) have any length; logit_scale is tau, a number or a scalar.
    Source: Radford et al. 2021, section 3.1.2.
    """
    tau = torch.as_tensor(logit_scale, dtype=image_features.dtype, device=image_features.device)
    # p(k|x) = softmax_k(kappa S(x, c_k))
    return (tau.exp() * cosine_similarity_matrix(image_features, text_features)).softmax(dim=1)


# --- The gradient of a cosine ---


def cosine_gradient(image_features, text_features):
    """The gradient of each image's similarity to its own text, with respect to the image's features.

    Args:
        image_features: u, (B, D), of any length but 0.
        text_features: (B, D), of any length but 0, row i the text that image i shall show; or (1, D) for all.

    Returns:
        (B, D), for each sample by itself.

    Raises:
        ValueError: if the shapes do not fit.

    Source: Nichol et al. 2022, section 2.4, for what is differentiated; the derivative is elementary.
    """
    batch, dim = image_features.shape
    if text_features.shape not in ((batch, dim), (1, dim)):
        raise ValueError(
            f"text_features must have shape ({batch}, {dim}), one row per image, or (1, {dim}); "
            f"got {tuple(text_features.shape)}"
        )
    length = image_features.norm(dim=1, keepdim=True)  # (B, 1)
    u, v = image_features / length, F.normalize(text_features, dim=1)
    # dS/du = (v - S u) / |u|, with u and v of length 1 on the right
    return (v - (u * v).sum(dim=1, keepdim=True) * u) / length


def similarity_gradient(encode_image, x_t, t, text_features):
    """The gradient of each noisy image's similarity to its own text, with respect to x_t.

    It works under no_grad and inference_mode too, and leaves no graph and no .grad behind.

    Args:
        encode_image: callable (x_t, t) -> features (B, D), of a noise-aware CLIP.
        x_t: (B, ...).
        t: steps of the original schedule, (B,).
        text_features: (B, D), the text that each sample shall show, or (1, D).

    Returns:
        Like x_t; the factor kappa = exp(logit_scale) is not included.

    Raises:
        ValueError: if text_features does not fit.

    Source: Nichol et al. 2022, section 2.4.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x_t, t, text_features = x_t.detach().clone(), t.clone(), text_features.detach().clone()
        x_t.requires_grad_()
        features = encode_image(x_t, t)  # (B, D)
        slope = cosine_gradient(features.detach(), text_features.to(features))  # dS/du
        # dS/dx_t = (du/dx_t)^T dS/du: no sample's features depend on another sample
        (gradient,) = torch.autograd.grad(features, x_t, slope)
        return gradient


# --- A clean CLIP and the predicted image ---


def similarity_gradient_through_x_0(denoiser, x_0_of, encode_image, x_t, t, text_features):
    """The gradient of a clean CLIP's similarity at x_0-hat, with respect to x_t, through the denoiser.

    It works under no_grad and inference_mode too, and leaves no graph and no .grad behind.

    Args:
        denoiser: callable (x_t, t) -> output, differentiable by x_t.
        x_0_of: callable (output, x_t, t) -> x_0-hat, like x_t, not clamped.
        encode_image: callable (x_0-hat) -> features (B, D), of a clean CLIP.
        x_t: (B, ...).
        t: steps of the original schedule, (B,).
        text_features: (B, D), the text that each sample shall show, or (1, D).

    Returns:
        The denoiser's output, without a graph, and the gradient, like x_t, without the factor kappa.

    Raises:
        ValueError: if text_features does not fit.

    Source: Chung et al. 2023, section 3; Bansal et al. 2023, section 3.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x_t, t, text_features = x_t.detach().clone(), t.clone(), text_features.detach().clone()
        x_t.requires_grad_()
        output = denoiser(x_t, t)
        features = encode_image(x_0_of(output, x_t, t))  # (B, D)
        slope = cosine_gradient(features.detach(), text_features.to(features))
        (gradient,) = torch.autograd.grad(features, x_t, slope)
        return output.detach(), gradient


# --- A guided denoiser is a denoiser ---


def carrying_gradient(denoiser, x_t, t):
    """What a denoiser says, (x_t, t) -> output; ValueError if that cannot be differentiated by x_t."""
    output = denoiser(x_t, t)
    if not output.requires_grad:
        raise ValueError(
            "with through='x_0' the denoiser must be differentiable by x_t; its output carries no "
            "gradient (is there a no_grad() or detach() inside?)"
        )
    return output


def clip_guided(denoiser, clip, text_features, scale, diffusion, through="x_t"):
    """A denoiser whose score is moved along the gradient of an image-text similarity.

    Args:
        denoiser: callable (x_t, t) -> output, unconditional.
        clip: a CLIP, noise-aware for through="x_t" (it gets x_t and t), clean for "x_0" (it gets x_0-hat).
        text_features: (B, D), the text that each sample shall show, or (1, D) for all; of any length.
        scale: s, a number that multiplies the gradient of the cosine similarity itself. The factor
            kappa = exp(logit_scale) is not included: s = kappa is Bayes' rule, 0 no guidance.
        diffusion: the Diffusion that the denoiser was trained for, or one respaced from it.
        through: "x_t", or "x_0" for the predicted clean image, differentiated through the denoiser.

    Returns:
        Callable (x_t, t) -> output, like denoiser.

    Raises:
        ValueError: if through is unknown, or text_features is no (B, D) tensor.

    Source: Nichol et al. 2022, section 2.4, for "x_t"; Bansal et al. 2023, section 3, for "x_0".
    """
    check_choice("through", through, ("x_t", "x_0"))
    if text_features.ndim != 2:
        raise ValueError(f"text_features must be of shape (B, D); got {tuple(text_features.shape)}")

    def x_0_of(output, x_t, t):
        # t counts the original schedule's steps, so its tables belong to the base
        alpha_bar = diffusion.base.at(t, x_t).alpha_bar
        prediction, _ = diffusion.split_output(output, x_t)
        return diffusion.predicted_x_0(prediction, x_t, alpha_bar, clip=False).to(x_t.dtype)

    def guided(x_t, t):
        if through == "x_t":
            gradient = similarity_gradient(clip.encode_image, x_t, t, text_features)
            output = denoiser(x_t, t)
        else:
            output, gradient = similarity_gradient_through_x_0(
                partial(carrying_gradient, denoiser), x_0_of, clip.encode_image, x_t, t, text_features
            )
        return diffusion.add_score(output, x_t, t, scale * gradient)

    return guided


# --- A large CLIP in its place ---


class OpenCLIP(nn.Module):
    """A model of the library open_clip behind this chapter's interface: clean images, and its own tokenizer.

    Args:
        model: an open_clip model.
        tokenizer: its tokenizer, callable: texts -> tokens (B, L).

    Attributes:
        tokenizer: as given.

    Source: Cherti et al. 2023 (open_clip); Radford et al. 2021, section 2.5, for the image size.
    """

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        size = model.visual.image_size
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.register_buffer("mean", torch.tensor(model.visual.image_mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(model.visual.image_std).reshape(-1, 1, 1))

    @property
    def logit_scale(self):
        """tau, the logarithm of the factor kappa at the similarities."""
        return self.model.logit_scale

    def preprocess(self, x):
        """Scale images x (B, 3, H, W) in [-1, 1] as the model expects them; differentiable, not clamped."""
        x = F.interpolate((x + 1) / 2, self.image_size, mode="bicubic", antialias=True)
        return (x - self.mean) / self.std

    def encode_image(self, x, t=None):
        """Features (B, D) of clean images x (B, 3, H, W) in [-1, 1]; ValueError if a step t is given."""
        if t is not None:
            raise ValueError("this CLIP reads clean images only: leave out t, and guide through='x_0'")
        return self.model.encode_image(self.preprocess(x))

    def encode_text(self, tokens):
        """Features (B, D) of texts as the tokenizer's tokens (B, L)."""
        return self.model.encode_text(tokens)


def load_open_clip(name="ViT-B-32", pretrained="laion2b_s34b_b79k"):
    """A pretrained CLIP, downloaded when it is first asked for (some 600 MB for the default).

    Args:
        name: an architecture that open_clip knows.
        pretrained: the tag of its weights; None for random ones.

    Returns:
        OpenCLIP, frozen and in evaluation mode.

    Raises:
        ImportError: if the package open_clip is not installed.
        ValueError: if there is no such architecture or tag.
        ConnectionError: if the weights cannot be downloaded.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("a pretrained CLIP needs open_clip: pip install open-clip-torch") from error

    check_choice("name", name, open_clip.list_models())
    if pretrained is not None:
        check_choice("pretrained", pretrained, open_clip.list_pretrained_tags_by_model(name))
    try:
        model = open_clip.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"the weights {pretrained!r} of {name!r} could not be downloaded ({error}). Connect to the "
            "network and try again; once downloaded, they are kept"
        ) from error
    return OpenCLIP(model, open_clip.get_tokenizer(name))
