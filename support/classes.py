"""Classes: which ones the words of --classes mean, of which ones samples are, and whether two
sets have the same. You need not read it to understand the method.
"""
import torch

from support.cli import BadInput, did_you_mean, listed, say


# ---------------------------------------------------------------- from words to labels

def class_numbers(words, count, names, owner='the network knows'):
    """The labels that `words` mean, to a network that knows `count` classes, called `names` or
    None: numbers, or names where there are such. words None means all of them. owner: whose classes
    they are, as the message begins.

    The words are what stood between commas. A name may hold commas itself, so that several words
    may be one; spaces beside a comma do not matter, nor do capitals where names differ in more than
    these. Raises BadInput for others."""
    if words is None:
        return range(count)
    if not names or not count:  # a network without classes may still know those of its images
        names = []
    counted = all(not name.isdecimal() for name in names)  # a class may itself be called 3
    if not words and 'none' in names:
        say(f'--classes none: no labels; for the class called none give {names.index("none")}')
    spelled = [tuple(part.strip() for part in word.split(',')) for word in names]
    given = ','.join(words)
    words = [word.strip() for word in words]
    numbers = []
    first = 0
    while first < len(words):
        number, length = longest_name(words[first:], spelled)
        word = words[first]
        if number is None and word.isdecimal() and counted and int(word) < count:
            number = int(word)
            length = 1
        if number is None:
            if not count:
                accepted = 'none; leave it out, or train with --classes'
            elif names in ([], [str(k) for k in range(count)]):
                accepted = f'0 to {count - 1}'
            else:
                accepted = listed(names)
            meant = did_you_mean(word, names)
            raise BadInput(f'--classes {given}: {owner} {accepted}{meant}')
        numbers.append(number)
        first += length
    return numbers


def longest_name(words, names):
    """Which of the names, each a tuple of words, is the longest that these words begin with -> (its
    number or None, its length). Capitals matter only where several names differ in nothing else."""
    for length in range(len(words), 0, -1):
        begin = tuple(words[:length])
        if begin in names:
            return names.index(begin), length
        small = [part.casefold() for part in begin]
        alike = [k for k, name in enumerate(names) if [part.casefold() for part in name] == small]
        if len(alike) == 1:
            return alike[0], length
    return None, 0


# ---------------------------------------------------------------- of which classes samples are

def same_labels(labels, names, images):
    """Labels of classes called `names` (or None), as the labels of the same classes in the data set
    `images`, int64 (n,); None where it has no such classes."""
    if labels is None or len(labels) == 0 or images is None or images.labels is None:
        return None
    if names and images.classes:
        numbers = [images.classes.index(name) if name in images.classes else -1 for name in names]
        labels = torch.tensor(numbers)[labels]
    if labels.min() < 0 or labels.max() > images.labels.max():
        return None
    return labels


def labels_of_samples(indices, flow, given, words, train):
    """The classes of samples `indices`, as labels of the data set `train`: int64 (n,), or None
    where they are not known.

    flow: what makes the samples, or None where they are the Images `given`: of the classes `words`
    of --classes in turn, or with labels of their own."""
    if train is None or train.labels is None:
        return None
    if flow is not None:
        return same_labels(flow.labels_of(indices, 'cpu'), flow.class_names, train)
    if words is not None:
        numbers = class_numbers(words, int(train.labels.max()) + 1, train.classes,
                                owner=f'{train.given} has')
        labels = [numbers[i % len(numbers)] for i in indices if numbers]
        return same_labels(torch.tensor(labels), train.classes, train)
    if given.labels is None:
        return None
    return same_labels(given.labels[list(indices)], given.classes, train)


def classes_to_compare(words, flows, given, train):
    """(the classes of the samples as a list of labels of `train`, None where they are all that it
    has or are not known; in words what they are and what is compared with them).

    flows: {name: Flow} of what makes the samples. The others as in labels_of_samples()."""
    samples = {}  # {name: the labels of one turn}
    if words is not None and not flows:
        turn = range(len(words))
        samples['samples'] = labels_of_samples(turn, None, given, words, train)
    elif given is not None:
        samples['samples'] = labels_of_samples(range(len(given)), None, given, None, train)
    for name, flow in flows.items():
        samples[name] = labels_of_samples(range(len(flow.classes)), flow, None, None, train)
    every = [] if train is None or train.labels is None else train.labels.unique().tolist()
    chosen = {name: labels.unique().tolist() for name, labels in samples.items()
              if labels is not None}
    parts = [labels for labels in chosen.values() if labels != every]
    if parts and any(labels != parts[0] for labels in chosen.values()):
        raise BadInput('--compare: networks of other classes; measure them one by one, or say by '
                       '--classes which ones they share')
    if parts:
        return parts[0], ' of ' + names_of_classes(parts[0], train.classes)

    # Nothing can be left out of statistics, nor where the samples do not say their classes.
    if words and not flows and not chosen:
        return None, f' of all its classes, where the samples are of {",".join(words)}'
    if given is not None and not chosen and len(every) > 1:
        return None, f' of all {len(every)} classes; --classes says those of the samples'
    for flow in flows.values():
        is_part = 0 < len(set(flow.classes)) < flow.class_count
        if is_part and not chosen:
            return None, (' of all its classes, where the samples are of '
                          + names_of_classes(sorted(set(flow.classes)), flow.class_names))
    return None, ''


# ---------------------------------------------------------------- in words

def names_of_classes(labels, names):
    """Some classes in words; of many the first."""
    words = [names[label] if names else str(label) for label in labels]
    line = ', '.join(words[:8])
    if len(words) > 8:
        line += f' ... ({len(words)} in all)'
    return f'class {line}' if len(words) == 1 else f'classes {line}'


def other_shares(labels, train):
    """In words, whether classes have other shares among samples with these labels than in the data
    set, with which a distance to all of it would be that of the shares too."""
    if labels is None:
        return ''
    classes = int(train.labels.max()) + 1
    ours = labels.bincount(minlength=classes) / len(labels)
    theirs = train.labels.bincount(minlength=classes) / len(train)
    if (ours - theirs).abs().max() < 0.02:
        return ''
    return ', whose classes have other shares'
