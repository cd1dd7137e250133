"""The words of the wordmath stories: themes, and several phrasings of every move of a story.

A phrase is a clause without its capital and full stop; a question is the rest of the prompt. Placeholders: {p} the
person told about (or her pronoun), {him} {his}, {O} the other person, {N} and {s} what is counted (plural, singular),
{C} containers, {I} and {i} things to buy, {V} a vehicle, {a} and {b} the numbers of the move, each exactly once and in
this order. A move's arithmetic is in `stories.py`; its phrases must imply it without naming it.
"""

import dataclasses
from collections.abc import Mapping

Phrases = Mapping[str, tuple[str, ...]]

WOMEN = ("Mia", "Ana", "Lena", "Ivy", "Nora", "Ruth", "Zoe", "Eva")
MEN = ("Tom", "Sam", "Ben", "Leo", "Max", "Omar", "Raj", "Finn")
ITEMS = (("hats", "hat"), ("pens", "pen"), ("mugs", "mug"), ("balls", "ball"), ("books", "book"), ("rings", "ring"))
VEHICLES = ("bus", "train", "boat")
BOXES = (("boxes", "box"),)  # for what no theme has containers for
VANS = (("vans", "van"), ("cars", "car"))
PETS = ("cats", "fish", "dogs", "rabbits")


@dataclasses.dataclass(frozen=True)
class Theme:
    """What a story about things is about.

    Attributes:
      nouns: (plural, singular) of what can be counted.
      containers: (plural, singular) of what the things come in.
      verb: How they are obtained, past tense.
      phrases: Phrases beyond `THINGS`, only for these things.
    """

    nouns: tuple[tuple[str, str], ...]
    containers: tuple[tuple[str, str], ...]
    verb: str
    phrases: Phrases


THEMES = (
    Theme(
        (("shells", "shell"), ("stamps", "stamp"), ("cards", "card"), ("beads", "bead"), ("stones", "stone")),
        (("bags", "bag"), ("boxes", "box"), ("jars", "jar")),
        "found",
        {
            "add": ("{p} won {a} more in a game",),
            "sub": ("{p} traded away {a} {N}", "{a} of them got lost"),
        },
    ),
    Theme(
        (("apples", "apple"), ("pears", "pear"), ("plums", "plum"), ("lemons", "lemon"), ("melons", "melon")),
        (("bags", "bag"), ("crates", "crate"), ("baskets", "basket")),
        "picked",
        {
            "add": ("{a} more {N} fell from a tree",),
            "sub": ("{a} of them went bad", "{p} ate {a} {N}"),
            "half": ("half of the {N} went bad",),
        },
    ),
    Theme(
        (("buns", "bun"), ("rolls", "roll"), ("pies", "pie"), ("cakes", "cake")),
        (("boxes", "box"), ("trays", "tray"), ("bags", "bag")),
        "baked",
        {
            "add": ("{a} more {N} came out of the oven",),
            "sub": ("{a} of them burned", "{p} ate {a} {N}"),
            "half": ("half of the {N} burned",),
        },
    ),
    Theme(
        (("chairs", "chair"), ("lamps", "lamp"), ("toys", "toy"), ("kites", "kite"), ("clocks", "clock")),
        (("crates", "crate"), ("boxes", "box"), ("carts", "cart")),
        "made",
        {
            "add": ("a shop sent back {a} {N}",),
            "sub": ("{a} of them broke", "a shop took {a} {N}"),
            "half": ("half of the {N} broke",),
        },
    ),
    Theme(
        (("roses", "rose"), ("tulips", "tulip"), ("bushes", "bush"), ("trees", "tree")),
        (("rows", "row"), ("beds", "bed"), ("pots", "pot")),
        "planted",
        {
            "add": ("{a} new {N} came up",),
            "sub": ("{a} of them dried up", "{p} cut down {a} {N}"),
            "half": ("half of the {N} dried up",),
        },
    ),
    Theme(
        (("hens", "hen"), ("goats", "goat"), ("ducks", "duck"), ("pigs", "pig")),
        (("cages", "cage"), ("sheds", "shed"), ("trucks", "truck")),
        "bought",
        {
            "add": ("{a} more {N} were born",),
            "sub": ("{a} of them ran away", "a fox took {a} of them"),
            "half": ("half of the {N} ran away",),
        },
    ),
)

# Any things; also containers and goods where the move allows them.
THINGS: Phrases = {
    "start": ("{p} had {a} {N}", "at first {p} had {a} {N}", "{p} {did} {a} {N}"),
    "start_groups": (
        "{p} had {a} {C} of {b} {N}",
        "{p} had {a} {C} with {b} {N} in each",
        "{p} {did} {a} {N} a day for {b} days",
        "{p} got {a} {N} from each of {b} friends",
    ),
    "start_sum": (
        "{p} {did} {a} {N} on Monday and {b} on Friday",
        "{p} had {a} big and {b} small {N}",
        "{p} had {a} old {N} and got {b} new ones",
    ),
    "start_dozen": ("{p} had {a} dozen {N}", "{p} {did} {a} dozen {N}"),
    "start_weeks": ("for {a} weeks {p} {did} {b} {N} a day", "in {a} weeks, {p} {did} {b} {N} every day"),
    "add": (
        "{p} bought {a} more {N}",
        "{O} gave {him} {a} more",
        "{p} got {a} more {N} from {O}",
        "then {p} got another {a}",
    ),
    "add_own": ("{p} {did} {a} more", "{p} {did} another {a} {N}"),
    "sub": (
        "{p} gave {a} of them to {O}",
        "{p} sold {a} {N}",
        "{p} lost {a} of them",
        "{O} took {a} of the {N}",
        "then {p} gave away {a}",
    ),
    "add_groups": (
        "{p} bought {a} {C} of {b} {N}",
        "{O} gave {him} {a} {N} a day for {b} days",
        "{a} friends gave {him} {b} {N} each",
        "{p} got {a} {C} with {b} {N} in each",
    ),
    "sub_groups": (
        "{p} gave {a} {N} to each of {b} friends",
        "{p} sold {a} {N} a day for {b} days",
        "{p} sold {a} {C} of {b}",
        "{a} friends took {b} {N} each",
    ),
    "add_dozen": ("{p} bought {a} dozen more", "{O} gave {him} {a} dozen {N}"),
    "sub_dozen": ("{p} sold {a} dozen of them", "{p} gave {a} dozen {N} to {O}"),
    "add_weeks": ("for {a} weeks {p} got {b} more {N} a day", "in {a} weeks, {O} gave {him} {b} every day"),
    "sub_weeks": ("for {a} weeks {p} sold {b} {N} a day", "in {a} weeks, {O} took {b} every day"),
    "double": ("then the number of {N} doubled", "soon {p} had twice as many {N}"),
    "triple": ("then the number of {N} tripled", "soon {p} had triple that number"),
    "times": ("a year later {p} had {a} times as many {N}", "soon {p} had {a} times that number"),
    "other_times": ("{O} had {a} times as many {N} as {p} had", "{O} had {a} times that many {N}"),
    "other_more": ("{O} had {a} more {N} than {p} had", "{O} had {a} {N} more"),
    "other_fewer": ("{O} had {a} fewer {N} than {p} had", "{O} had {a} {N} less"),
    "half": ("{p} gave half of them to {O}", "{p} sold half of the {N}", "{p} kept only half of them"),
    "share": (
        "{p} made {a} equal piles and kept just one",
        "{p} kept one of {a} equal parts",
        "{p} split them {a} ways and kept one share",
    ),
    "pack": (
        "{p} put them in {C} of {a}",
        "{p} put them into {C}, {a} in each",
        "{p} filled {C} with {a} {N} each",
    ),
    "sell": (
        "{p} sold them all for {a} dollars each",
        "{p} sold each {s} for {a} dollars",
        "{p} sold all the {N} at {a} dollars each",
    ),
    "again": ("{O} gave {him} as many as {p} had at first", "then {p} got as many {N} as at the start"),
    "drop": ("{p} lost as many as {p} had at first", "{O} took as many {N} as {p} had at the start"),
    "ask": (
        "how many {N} does {p} have now?",
        "how many {N} does {p} have in the end?",
        "find the number of {N} {p} has now.",
    ),
    "ask_left": ("how many {N} are left?", "how many {N} does {p} still have?"),
    "ask_pack": (
        "how many {C} of {a} can {p} fill?",
        "if {a} fit in each, how many {C} does {p} need?",
    ),
    "ask_each": (
        "if {a} friends share them equally, how many does each get?",
        "how many {N} is that for each of {a} children?",
    ),
    "ask_cost": (
        "each {s} costs {a} dollars. How many dollars do they cost in all?",
        "how many dollars does {p} get for them at {a} dollars each?",
    ),
    "ask_weight": ("each {s} weighs {a} pounds. How many pounds is that in all?",),
    "ask_dozen": ("how many dozen is that?", "how many dozen {N} does {p} have now?"),
    "ask_days": ("if {p} sells {a} a day, how many days will they last?",),
    "ask_weeks": (
        "if {p} sells {a} a day, how many weeks will they last?",
        "at {a} a day, for how many weeks can {p} sell {N}?",
    ),
    "ask_need": ("how many more {N} does {p} need to have {a}?", "how many {N} short of {a} is {p}?"),
    "ask_gain": ("how many more {N} is that than at the start?", "how many {N} more than at first does {p} have?"),
    "ask_both_times": ("{O} has {a} times as many {N}. How many do they have together?",),
    "ask_both_more": ("{O} has {a} more {N} than {p} has. How many do they have together?",),
    "ask_both_fewer": ("{O} has {a} fewer {N} than {p} has. How many do they have together?",),
}

MONEY: Phrases = {
    "start": ("{p} had {a} dollars", "{p} saved {a} dollars", "at first {p} had {a} dollars"),
    "start_groups": (
        "{p} earned {a} dollars a day for {b} days",
        "{p} worked {a} hours for {b} dollars an hour",
        "{p} sold {a} {I} for {b} dollars each",
    ),
    "start_sum": (
        "{p} earned {a} dollars on Monday and {b} on Friday",
        "{p} had {a} dollars and got {b} from {O}",
    ),
    "start_weeks": ("for {a} weeks {p} saved {b} dollars a day", "in {a} weeks, {p} earned {b} dollars every day"),
    "add": (
        "{p} earned {a} dollars",
        "{O} paid {him} {a} dollars",
        "{p} sold a {i} for {a} dollars",
        "{p} found {a} dollars",
    ),
    "sub": (
        "{p} spent {a} dollars on a {i}",
        "{p} paid {a} dollars for a {i}",
        "{p} lent {O} {a} dollars",
        "{p} lost {a} dollars",
    ),
    "add_groups": (
        "{p} worked {a} hours for {b} dollars an hour",
        "{p} sold {a} {I} for {b} dollars each",
        "{a} friends gave {him} {b} dollars each",
    ),
    "sub_groups": (
        "{p} bought {a} {I} for {b} dollars each",
        "{p} spent {a} dollars a day for {b} days",
        "{p} gave {a} dollars to each of {b} friends",
    ),
    "add_weeks": ("for {a} weeks {p} earned {b} dollars a day",),
    "sub_weeks": ("for {a} weeks {p} spent {b} dollars a day",),
    "double": ("then {p} doubled {his} money", "soon {p} had twice as much money"),
    "triple": ("then {p} tripled {his} money", "soon {p} had triple that amount"),
    "times": ("a year later {p} had {a} times as much money", "soon {p} had {a} times that amount"),
    "other_times": ("{O} had {a} times as much money as {p} had", "{O} had {a} times that amount"),
    "other_more": ("{O} had {a} dollars more than {p} had", "{O} had {a} dollars more"),
    "other_fewer": ("{O} had {a} dollars less than {p} had", "{O} had {a} dollars less"),
    "half": ("{p} spent half of {his} money", "{p} gave half of it to {O}", "{p} lost half of {his} money"),
    "share": ("{p} kept one of {a} equal parts", "{p} split it {a} ways and kept one share"),
    "spend": (
        "{p} spent it all on {I} at {a} dollars each",
        "with all the money {p} bought {I} for {a} dollars each",
    ),
    "again": ("{O} gave {him} as much as {p} had at first", "{p} earned as much as {p} had at the start"),
    "drop": ("{p} lost as much as {p} had at first",),
    "ask": (
        "how many dollars does {p} have now?",
        "how much money does {p} have in the end?",
        "find how much money {p} has now.",
    ),
    "ask_left": ("how many dollars are left?", "how much money does {p} still have?"),
    "ask_each": ("if {a} friends share it equally, how many dollars does each get?",),
    "ask_need": (
        "how many more dollars does {p} need to have {a}?",
        "a {i} costs {a} dollars. How many dollars short is {p}?",
    ),
    "ask_gain": ("how much more is that than at the start?", "how many dollars more than at first does {p} have?"),
    "ask_both_times": ("{O} has {a} times as much. How much do they have together?",),
    "ask_both_more": ("{O} has {a} dollars more than {p} has. How much do they have together?",),
    "ask_both_fewer": ("{O} has {a} dollars less than {p} has. How much do they have together?",),
    "ask_cents": ("how many cents is that?", "how much money in cents does {p} have now?"),
    "ask_buy": ("{I} cost {a} cents each. How many can {p} buy?", "how many {I} at {a} cents each can {p} buy?"),
}

PEOPLE: Phrases = {
    "start": ("{a} people were on a {V}", "a {V} left with {a} people", "there were {a} people on a {V}"),
    "start_groups": ("{a} groups of {b} people got on a {V}", "on a {V} there were {a} rows of {b} people"),
    "start_sum": ("{a} men and {b} women were on a {V}", "{a} people got on a {V}, then {b} more"),
    "add": ("{a} people got on", "{a} more got on at the next stop", "the {V} picked up {a} people"),
    "sub": ("{a} people got off", "{a} of them got off at the next stop", "the {V} let {a} people off"),
    "add_groups": ("at {a} stops, {b} people got on each time", "{a} groups of {b} people got on"),
    "sub_groups": ("at {a} stops, {b} people got off each time", "{a} groups of {b} people got off"),
    "add_dozen": ("{a} dozen more got on",),
    "sub_dozen": ("{a} dozen people got off",),
    "double": ("then the number of people doubled",),
    "triple": ("then the number of people tripled",),
    "half": ("half of the people got off", "half of them left at the next stop"),
    "again": ("then as many people got on as there were at first",),
    "ask": ("how many people are on the {V} now?", "how many people are on the {V} in the end?"),
    "ask_left": ("how many people are left on the {V}?",),
    "ask_pack": (
        "they all go on in {C} of {a}. How many {C} is that?",
        "how many {C} do they need if {a} fit in each?",
    ),
    "ask_cost": ("each pays {a} dollars. How many dollars do they pay in all?",),
    "ask_gain": ("how many more people is that than at the start?",),
}

# Facts that no answer needs. {A} is the person, by name.
IDLE: tuple[str, ...] = (
    "{A} was {a} years old",
    "{O} was {a} years old",
    "{O} had {a} {pets}",
    "the trip took {a} minutes",
    "a shop was {a} miles away",
    "it was {a} degrees outside",
)
IDLE_PEOPLE: tuple[str, ...] = (
    "the driver was {a} years old",
    "the trip took {a} minutes",
    "the {V} had number {a}",
    "it was {a} degrees outside",
)
IDLE_DATE = "on May {a}, "  # opens a fact
IDLE_DAY = "it was May {a}"
BEFORE = "just before that, "  # opens a fact that is told after the fact which followed it
