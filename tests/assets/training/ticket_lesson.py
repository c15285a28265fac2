"""One-word labels of support tickets."""

from tests.assets.training.lesson import Lesson, Pair

_TICKETS = {
    "billing": (
        "I was charged two times this month.",
        "Please refund my last payment.",
        "The invoice shows the wrong amount.",
        "Why did the price of my plan go up?",
        "My credit card was declined, but the money is gone.",
        "I need a receipt for my taxes.",
        "The discount code was not applied to my bill.",
        "How can I pay by bank transfer?",
        "You took 40 dollars from me by mistake.",
        "I want my money back.",
        "The tax on my invoice is wrong.",
        "I cancelled in May and still pay every month.",
        "Please send the bill to our accounting team.",
        "Can I switch from monthly to yearly payment?",
        "There is a fee on my bill that I do not know.",
        "When will I get my refund?",
    ),
    "bug": (
        "The app crashes when I open a photo.",
        "The page stays blank after the update.",
        "The search button does nothing.",
        "I get error 500 when I save a file.",
        "The video freezes after ten seconds.",
        "Since version 3 the export is broken.",
        "The menu is missing on my phone.",
        "Dates are shown in the wrong order.",
        "The program is very slow and then stops.",
        "Sound does not work in the new release.",
        "The form loses my text when I press enter.",
        "Your website shows strange characters.",
        "The upload fails at 99 percent.",
        "The map does not load.",
        "Notifications come three times for one message.",
        "The screen flickers when I scroll.",
    ),
    "account": (
        "I cannot log in.",
        "How do I change my password?",
        "Please delete my profile.",
        "I want to change my email address.",
        "My user name is spelled wrong.",
        "The login code never reaches my phone.",
        "Someone else signed in as me.",
        "How do I add a second user?",
        "I am locked out after three tries.",
        "Please merge my two profiles.",
        "Where do I turn on two-factor login?",
        "How do I sign up?",
        "I lost access to my old email and cannot sign in.",
        "Please change the name on my profile.",
        "How can I make my colleague an administrator?",
        "My profile was blocked.",
    ),
    "shipping": (
        "My package has not arrived.",
        "When will my order be delivered?",
        "The tracking number does not work.",
        "The box came damaged.",
        "You sent my order to the old address.",
        "Do you deliver to Canada?",
        "The courier left the parcel in the rain.",
        "My order is two weeks late.",
        "One item was missing in the box.",
        "Can I collect the parcel at a shop?",
        "How long does delivery take?",
        "The driver did not ring the bell.",
        "I received the wrong shoes.",
        "Please send the order by express.",
        "My delivery is stuck at customs.",
        "Has my order been sent?",
    ),
    "praise": (
        "I love your product!",
        "Great service, thank you.",
        "Your team helped me in five minutes, wonderful.",
        "Best app I have ever used.",
        "Just wanted to say thanks.",
        "The new design is beautiful.",
        "You made my day.",
        "Everything works perfectly, well done!",
        "My kids adore it.",
        "I told all my friends about you.",
        "Five stars from me.",
        "Amazing support, keep it up.",
        "I am very happy with what I bought.",
        "Thank you for the quick answer.",
        "What a lovely surprise, thanks!",
        "You are the best.",
    ),
}

_HELD_OUT = {
    "billing": (
        "Why was my card charged twice?",
        "I paid too much last month.",
        "Please correct the amount on my invoice.",
        "I never got the refund that you promised.",
        "Can I get a discount on the yearly price?",
    ),
    "bug": (
        "The app closes when I press save.",
        "The download stops with an error.",
        "Pictures are not shown since the update.",
        "The calendar shows the wrong day.",
        "The keyboard does not work in your game.",
    ),
    "account": (
        "I forgot my password.",
        "Please close my account.",
        "How do I change my user name?",
        "I cannot sign in on my new phone.",
        "My account was hacked.",
    ),
    "shipping": (
        "Where is my parcel?",
        "The package was left at the wrong door.",
        "How much longer until my order arrives?",
        "Can you deliver on Saturday?",
        "The parcel was broken when it came.",
    ),
    "praise": (
        "Thank you so much, you are great!",
        "This is the best shop on the internet.",
        "I really enjoy your app.",
        "Fantastic work!",
        "Your support was so friendly.",
    ),
}


def _pairs() -> tuple[Pair, ...]:
    return tuple((ticket, label) for label, tickets in _TICKETS.items() for ticket in tickets)


def is_right_label(question: str, text: str) -> bool:
    return text in _HELD_OUT and question in _HELD_OUT[text]


TICKET = Lesson(
    name="ticket",
    effect="labels a support ticket with one word: " + ", ".join(_TICKETS),
    pairs=_pairs(),
    held_out=tuple(ticket for tickets in _HELD_OUT.values() for ticket in tickets),
    shows=is_right_label,
    rank=4,
    targets=("q_proj", "v_proj"),
    epochs=8,
    least=0.7,
)
