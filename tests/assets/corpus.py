"""Sentences that train the tokenizer and serve as prompts in the tests and the demo."""

SENTENCES: dict[str, tuple[str, ...]] = {
    "legal": (
        "The tenant may end this agreement by giving three months' written notice to the landlord.",
        "Neither party shall be liable for a delay caused by events beyond its reasonable control.",
        "The arbitral tribunal sits in Geneva and its award is final and binding on both parties.",
        "Confidential information must be returned or destroyed within ten days of the request.",
        "This clause survives the termination of the contract, whatever the reason for it.",
        "The licensee shall not assign its rights without the prior consent of the licensor.",
    ),
    "medical": (
        "The patient reports chest pain on exertion, relieved by rest, for about two weeks.",
        "Start with five milligrams daily and check renal function and potassium after ten days.",
        "The scan shows a small effusion on the left without any sign of consolidation.",
        "Blood pressure was 142 over 91 at admission and 128 over 80 at discharge.",
        "No known allergies; vaccinations are complete; the family history is unremarkable.",
        "Wound healing is delayed in patients with poorly controlled diabetes mellitus.",
    ),
    "support": (
        "My parcel has been stuck at the sorting centre since Tuesday, can you find out why?",
        "I was charged twice for the same order and would like one payment refunded, please.",
        "The app logs me out each time I switch from the mobile network to wireless.",
        "How do I change the e-mail address of my account without losing my history?",
        "Die Lieferung kam heute an, aber das Netzteil fehlt. Bitte schicken Sie es nach.",
        "Bonjour, je souhaite annuler mon abonnement à la fin du mois. Merci d'avance.",
    ),
    "code": (
        "def clamp(value: float, low: float, high: float) -> float: return max(low, min(value, high))",
        "for index, item in enumerate(sorted(items, key=lambda pair: pair[1])): print(index, item)",
        "SELECT customer, sum(amount) FROM orders WHERE day >= '2026-01-01' GROUP BY customer;",
        "The function leaks a file handle when the parser raises before the block is left.",
        "git rebase --interactive lets you reorder, squash and reword the commits of a branch.",
        'fn main() { let total: u64 = (1..=10).map(|n| n * n).sum(); println!("{total}"); }',
    ),
    "finance": (
        "Revenue rose by 12.4 percent to 3.1 billion, while the operating margin fell to 18 percent.",
        "The bond pays a fixed coupon of four percent and matures in the spring of 2031.",
        "Free cash flow after leases was negative because of higher inventories in the second quarter.",
        "The board proposes a dividend of 0.85 per share, to be paid after the annual meeting.",
        "Hedging costs are recognised in other comprehensive income until the sale takes place.",
        "A downgrade by one notch would raise the interest margin by twenty-five basis points.",
    ),
    "catalog": (
        "Waterproof hiking boot, full-grain leather, sizes 36 to 47, brown, 620 grams each.",
        "Stainless steel kettle, 1.7 litres, 2200 watts, switches off by itself, cord storage.",
        "Desk lamp with a dimmer, warm white to daylight, two joints, weighted base, black.",
        "Organic cotton T-shirt, regular fit, pre-washed, colours: navy, sand, forest, white.",
        "Replacement filter for vacuum cleaners of the 500 series, washable, pack of two.",
        "Mechanical keyboard, 75 percent layout, hot-swappable switches, wireless, 4000 mAh.",
    ),
    "general": (
        "The ferry leaves at seven and reaches the island before the morning fog has lifted.",
        "Nobody in the village could say who had built the bridge, or when, or why so high.",
        "Rain is expected in the west by noon; the east stays dry and mild until the evening.",
        "She tuned the old violin by ear, humming, while the rest of the orchestra packed up.",
        "東京は日本の首都であり、人口の多い都市です。",
        "Привет, как дела? Сегодня хорошая погода, и мы идём в парк. 🌳",
    ),
}

TEXTS: tuple[str, ...] = tuple(sentence for group in SENTENCES.values() for sentence in group)
