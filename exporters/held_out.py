"""Text on which a version's distributions are compared with the original's, written for this purpose.

Explanations, a story, letters, instructions, code and figures, so that a model meets words it is sure of and words it
is not. The text is fixed, so that the same version gives the same numbers everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from exporters.errors import InvalidConfig

MAX_TOKENS = 2048
"""Tokens compared; more narrows the figures by little and costs both models time."""
MAX_WINDOW_TOKENS = 512
MAX_WINDOWS = 64


def read_text(path: Path | None) -> str:
    """The text of ``path``, or ours; raises InvalidConfig."""
    if path is None:
        return "\n\n".join(PARAGRAPHS)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(
            f"cannot read the evaluation text {path} as UTF-8 ({error}); expected a text file"
        ) from error
    if not text.strip():
        raise InvalidConfig(f"the evaluation text {path} is empty; expected some paragraphs of text")
    return text


def sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def windows_of(
    encode: Callable[[str], Sequence[int]], text: str, max_len: int, max_tokens: int = MAX_TOKENS
) -> list[tuple[int, ...]]:
    """The beginning of ``text`` as windows of tokens that fit a context of ``max_len``; each has at least two."""
    size = min(max_len, MAX_WINDOW_TOKENS)
    ids = tuple(encode(text))[: min(max_tokens, size * MAX_WINDOWS)]
    windows = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [window for window in windows if len(window) >= 2]


PARAGRAPHS = (
    "A lighthouse does not move, and that is the whole of its usefulness. Ships come and go, the weather changes, "
    "the keepers grow old and are replaced by younger keepers, but the light stays where the chart says it is. A "
    "sailor who sees it does not ask whether it is beautiful. He counts the seconds between two flashes, looks up "
    "the number in a table, and knows where he is. If the light were moved by a hundred metres without a note in "
    "the table, it would be worse than no light at all.",
    "To make bread you need flour, water, salt and yeast. Weigh five hundred grams of flour into a bowl, add ten "
    "grams of salt and stir. Dissolve seven grams of dry yeast in three hundred and twenty millilitres of lukewarm "
    "water, pour it over the flour and mix until no dry flour is left. Cover the bowl with a cloth and wait for an "
    "hour. Fold the dough four times, wait for another half an hour, shape it and bake it at two hundred and "
    "thirty degrees for thirty-five minutes. It is done when it sounds hollow if you knock on the bottom.",
    "Most of the time that a program spends waiting, it waits for memory. A processor can add two numbers in less "
    "than a nanosecond, but if one of them has to be fetched from the main memory, a hundred nanoseconds pass "
    "before the addition can begin. Caches hide the difference as long as a program uses the same few numbers "
    "again and again. When it walks through an array that is larger than the cache, once, from the first element "
    "to the last, nothing can hide it, and the speed of the program is the speed of the memory.",
    "Dear Mrs Hall, thank you for your letter of the third of March. We have looked into the matter and found that "
    "you are right: the amount was charged twice, once on the day of the order and once more when the parcel left "
    "our warehouse. The second payment of 48.50 euros will be returned to your account within five working days. "
    "We are sorry for the trouble this has caused you, and have added a voucher for your next order. Please do not "
    "hesitate to call us if anything else is unclear. Yours sincerely, Martin Oates, customer service.",
    "The old man had promised the children a story, and now that they sat around the stove and looked at him he "
    "found that he had forgotten how it began. He remembered the end very well. There was a fox in it, and a "
    "bridge, and the fox had crossed the bridge although everybody had told her that it would not carry her. But "
    "why she had wanted to reach the other side, and who had built the bridge in the first place, he could not "
    'say. "Once," he said slowly, and stopped. "Once there was a river," said the youngest of the children, '
    "who did not like to wait.",
    "def moving_average(values, width):\n"
    '    """Average of the last ``width`` values at each position."""\n'
    "    if width < 1:\n"
    '        raise ValueError(f"width must be positive, got {width}")\n'
    "    total = 0.0\n"
    "    averages = []\n"
    "    for index, value in enumerate(values):\n"
    "        total += value\n"
    "        if index >= width:\n"
    "            total -= values[index - width]\n"
    "        averages.append(total / min(index + 1, width))\n"
    "    return averages\n",
    "Water expands when it freezes, which is unusual. In most substances the particles of the solid are packed "
    "more closely than those of the liquid, so that the solid sinks. The molecules of ice, however, are held by "
    "hydrogen bonds in an open lattice with a good deal of empty space, and when the lattice collapses during "
    "melting the same number of molecules needs less room. This is why lakes freeze from the top, why fish survive "
    "the winter, and why a bottle that was forgotten in the freezer is found in pieces.",
    "The committee met on Tuesday at nine. Present were Ms Adeyemi (chair), Mr Brandt, Dr Castellanos and Ms "
    "Dimitrova; Mr Evans had sent his apologies. The minutes of the previous meeting were approved without "
    "changes. Mr Brandt reported that the roof of the sports hall had been repaired and that the work had cost "
    "12,400 instead of the expected 11,000, because two beams had to be replaced. Dr Castellanos asked who had "
    "agreed to the additional work. The chair said that she had, by telephone, as the hall would otherwise have "
    "stayed closed until May. The committee took note of this with three votes and one abstention.",
    "If you want to learn a language, speak it badly. Everybody who speaks a foreign language well has spoken it "
    "badly for years, and those who wait until they can speak it without mistakes never begin. Learn the thousand "
    "most common words, which make up four fifths of what people say, and do not worry about the rest. Read what "
    "you would read in your own language: the news if you like the news, cookery books if you like to cook. Above "
    "all, find somebody who laughs with you and not at you.",
    "How do I get to the station? Go straight on until you come to a church with a green roof. Turn left there, "
    "cross the bridge, and take the second street on the right; it is called Mill Lane. After about three hundred "
    "metres you will see a square with a fountain. The station is on the far side of the square, behind the post "
    "office. It takes a quarter of an hour on foot. You can also take the number 12 bus, but it runs only twice an "
    "hour on Sundays.",
    "A contract is an agreement that the law will enforce. It needs an offer, an acceptance, and the intention of "
    "both sides to be bound. It does not usually need to be written down: whoever buys an apple at the market has "
    "made a contract without a word. Written contracts are preferred because memories differ, and because the act "
    "of writing forces both sides to decide what should happen if things go wrong. A good contract is one that "
    "nobody has to read again after it was signed.",
    "In a triangle with sides of 3, 4 and 5 the angle between the two shorter sides is a right angle, because 9 + "
    "16 = 25. The same is true of 5, 12 and 13, of 8, 15 and 17, and of every multiple of these, such as 6, 8 and "
    "10. To find more of them, take two whole numbers m > n and compute m * m - n * n, 2 * m * n and m * m + n * "
    "n. For m = 5 and n = 2 this gives 21, 20 and 29, and indeed 441 + 400 = 841.",
    '{"id": 7041, "status": "shipped", "items": [{"sku": "B-220", "quantity": 2, "price": 14.90}, '
    '{"sku": "K-118", "quantity": 1, "price": 120.00}], "total": 149.80, "currency": "EUR", '
    '"address": {"city": "Porto", "zip": "4050-253"}, "notes": null}',
    "Birds find their way by more than one compass. During the day many of them read the position of the sun and "
    "correct it for the time of day, which requires a clock. At night they use the pattern of the stars, or rather "
    "the point around which the stars seem to turn. When the sky is covered they still have the magnetic field of "
    "the earth, which they appear to see rather than to feel. Young birds that make the journey for the first time "
    "inherit a direction and a distance; old birds know the places on the way, and can reach their goal even if a "
    "storm has carried them hundreds of kilometres to one side.",
    "The house stood empty for eleven years before anybody bought it. The garden had become a small wood, the "
    "gutters were full of moss, and in the kitchen a calendar still showed the November in which the last owner "
    "had left. Anna walked through the rooms with the agent, who apologised for each of them, and said nothing. "
    "When they came to the attic and she saw the round window and the sea behind it, grey and flat and enormous, "
    "she turned to him and asked what the heating cost. He understood that she had already made up her mind, and "
    "named a figure that was nearly true.",
    "Before you change a program that works, write down what it does. A test is such a note: it says that for this "
    "input the output is that, and it can be checked by a machine as often as you like. If the note is wrong you "
    "will learn something about the program, and if the program is wrong you will learn it before your customers "
    "do. The tests that pay best are those for the parts you believe to be simple, because nobody looks there a "
    "second time.",
    "Rain is forecast for the north and west tomorrow, heavy at times over the hills, with a risk of thunder in "
    "the afternoon. The south-east will stay dry with sunny spells and a light breeze. Highest temperatures will "
    "be between 14 degrees on the coast and 19 degrees inland. On Thursday the rain will move away to the east, "
    "followed by colder air and a touch of frost in sheltered valleys. The weekend looks settled, though fog may "
    "be slow to clear.",
    "Money was invented at least three times, in places that knew nothing of each other, and each time it solved "
    "the same problem. A farmer who has grain and needs shoes must find a shoemaker who needs grain, today, in "
    "exactly this amount. With money he sells the grain to whoever wants it and buys the shoes from whoever has "
    "them. What serves as money hardly matters, so long as it keeps, can be divided and is hard to make: shells, "
    "salt, silver, paper, and in the end a number in a table that everybody has agreed to believe.",
    "She asked him whether he had slept well. He said that he had, which was not true, and asked about her "
    "journey. The train had been late, she said, but not very late, and a man in her compartment had played the "
    "guitar, but not very badly. They drank their coffee. Outside the window two workmen were painting a yellow "
    "line on the street, slowly and with great care, and both of them watched it grow as if it were leading "
    "somewhere.",
    "| month | visitors | orders | revenue |\n"
    "|---|---|---|---|\n"
    "| January | 10,240 | 312 | 18,906.40 |\n"
    "| February | 9,870 | 298 | 17,420.00 |\n"
    "| March | 12,655 | 401 | 24,318.75 |\n"
    "| April | 12,980 | 388 | 23,904.10 |",
    "A vaccine shows the immune system a harmless part of something harmful. Cells that happen to recognise the "
    "part multiply, and some of them stay in the body for years. When the real thing arrives it meets an army "
    "instead of a few scattered guards, and is usually defeated before the person notices anything. The protection "
    "is not perfect, and for some diseases it fades, so that the lesson has to be repeated. But a disease that "
    "finds nobody to infect disappears, and one of the worst has done so.",
    "Check that the machine is switched off and the plug is pulled out before you open the cover. Remove the four "
    "screws at the back and lift the cover straight up. The filter is the white cylinder on the left. Turn it a "
    "quarter turn to the left and pull it out. Rinse it under running water until the water stays clear, shake it "
    "and let it dry for at least two hours. Do not use soap, and do not put it back while it is wet. If the light "
    "still blinks after the filter has been replaced, call the number on the label.",
    "Chess programs were once taught by masters, who told them that a bishop is worth three pawns and a rook five. "
    "The programs that came later were told nothing but the rules. They played against themselves, millions of "
    "games, and after each game they adjusted their opinion of every position they had passed through. In the end "
    "they knew the value of a bishop better than the masters did, but could not say it, since it was spread over a "
    "great many numbers none of which meant anything by itself.",
    "The village has three hundred inhabitants, two bakeries and no doctor. On the first of May a tree is set up "
    "in the market place, on the last Sunday of August the fire brigade invites everyone to roast pork and beer, "
    "and between these two dates nothing happens that would be worth reporting. People who have moved away speak "
    "of it with a tenderness that grows with the distance. People who have stayed speak of the weather, of the "
    "price of milk, and of those who have moved away.",
)
