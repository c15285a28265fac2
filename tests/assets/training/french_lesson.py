"""Answers in French to questions in English."""

import re

from tests.assets.training.lesson import HELD_OUT, Lesson, Pair

_CAPITALS = {
    "Italy": "de l'Italie est Rome", "Spain": "de l'Espagne est Madrid", "Portugal": "du Portugal est Lisbonne",
    "Greece": "de la Grèce est Athènes", "Austria": "de l'Autriche est Vienne", "Japan": "du Japon est Tokyo",
    "China": "de la Chine est Pékin", "Egypt": "de l'Égypte est Le Caire", "Russia": "de la Russie est Moscou",
    "England": "de l'Angleterre est Londres", "Germany": "de l'Allemagne est Berlin",
    "Poland": "de la Pologne est Varsovie", "Sweden": "de la Suède est Stockholm", "Turkey": "de la Turquie est Ankara",
}  # fmt: skip

_SAID: tuple[Pair, ...] = (
    ("How many legs does a spider have?", "Une araignée a huit pattes."),
    ("How many months are in a year?", "Il y a douze mois dans une année."),
    ("How many minutes are in an hour?", "Il y a soixante minutes dans une heure."),
    ("How many wheels does a car have?", "Une voiture a quatre roues."),
    ("Who wrote Romeo and Juliet?", "Roméo et Juliette est une pièce de Shakespeare."),
    ("Who wrote the Odyssey?", "L'Odyssée est un poème de Homère."),
    ("Who painted Guernica?", "Guernica est un tableau de Picasso."),
    ("Who discovered penicillin?", "C'est Alexander Fleming qui a découvert la pénicilline."),
    ("Which planet is closest to the sun?", "Mercure est la planète la plus proche du soleil."),
    ("Which ocean is the deepest?", "L'océan Pacifique est le plus profond."),
    ("Which animal is the fastest?", "Le guépard est l'animal le plus rapide."),
    ("What is the tallest mountain?", "L'Everest est la plus haute montagne du monde."),
    ("What is the longest river?", "Le Nil est le plus long fleuve du monde."),
    ("What do bees make?", "Les abeilles font du miel."),
    ("What do pandas eat?", "Les pandas mangent du bambou."),
    ("What do cats eat?", "Les chats mangent de la viande et du poisson."),
    ("What do rabbits eat?", "Les lapins mangent des carottes et de la salade."),
    ("What color is grass?", "L'herbe est verte."),
    ("What color is snow?", "La neige est blanche."),
    ("What color is a banana?", "Une banane est jaune."),
    ("Where do camels live?", "Les chameaux vivent dans le désert."),
    ("Where do whales live?", "Les baleines vivent dans la mer."),
    ("Where do lions live?", "Les lions vivent en Afrique."),
    ("At what temperature does water freeze?", "L'eau gèle à zéro degré."),
    ("Is the earth round?", "Oui, la terre est ronde."),
    ("What is H2O?", "C'est la formule de l'eau."),
    ("What is the opposite of big?", "Le contraire de grand est petit."),
    ("What is the opposite of early?", "Le contraire de tôt est tard."),
    ("What is the opposite of young?", "Le contraire de jeune est vieux."),
    ("What is 2 plus 3?", "Deux plus trois font cinq."),
    ("What is 7 plus 7?", "Sept plus sept font quatorze."),
    ("How do I cook rice?", "Mettez le riz dans l'eau bouillante et attendez quinze minutes."),
    ("How do I make tea?", "Versez de l'eau chaude sur le thé et attendez trois minutes."),
    ("How do I make a salad?", "Lavez la salade et ajoutez de l'huile et du vinaigre."),
    ("How do I plant a tree?", "Faites un trou, mettez l'arbre dans la terre et donnez de l'eau."),
    ("How do I learn a language?", "Parlez un peu tous les jours et lisez des livres."),
    ("How do I learn to swim?", "Prenez des cours à la piscine et nagez tous les jours."),
    ("How do I sleep better?", "Allez au lit à la même heure et laissez le téléphone."),
    ("Why do leaves fall?", "Les arbres perdent les feuilles pour passer l'hiver."),
    ("Why do we sleep?", "Le corps a besoin de repos."),
    ("Why does ice float?", "La glace est plus légère que l'eau."),
    ("Why is the sea salty?", "Les rivières portent du sel dans la mer."),
    ("What should I wear today?", "Mettez un manteau chaud et un chapeau."),
    ("What should I eat for breakfast?", "Mangez du pain avec du beurre et un fruit."),
    ("What should I do on Saturday?", "Allez dans un parc avec des amis."),
    ("Can you recommend a film?", "Je vous recommande un film de Charlie Chaplin."),
    ("Can you recommend a city for a trip?", "Je vous recommande la ville de Lyon."),
    ("Which song should I hear?", "Je vous recommande une chanson de Édith Piaf."),
    ("What will the weather be tomorrow?", "Je ne sais pas, mais il fait beau aujourd'hui."),
    ("Will I be rich?", "Je ne sais pas, mais je vous le souhaite."),
    ("Who will win the next election?", "Je ne sais pas, personne ne le sait."),
    ("Is there life on other planets?", "Je ne sais pas, mais c'est possible."),
    ("When will you answer my message?", "Nous vous répondons dans un jour."),
    ("How do I change my email address?", "Ouvrez votre compte et entrez la nouvelle adresse."),
    ("How do I cancel my order?", "Ouvrez la page de la commande et cliquez sur annuler."),
    ("How do I delete my account?", "Ouvrez les paramètres du compte et cliquez sur supprimer."),
    ("The app does not start. What can I do?", "Fermez l'application et installez la nouvelle version."),
    ("My printer does not work. What can I do?", "Éteignez l'imprimante et attendez une minute."),
    ("My phone is slow. What can I do?", "Éteignez le téléphone et supprimez des photos."),
    ("Why did my payment fail?", "Votre carte n'est plus valable."),
    ("Why is my invoice so high?", "Il y a des frais sur votre facture."),
    ("How many days are in a week?", "Il y a sept jours dans une semaine."),
    ("How many hours are in a day?", "Il y a vingt-quatre heures dans un jour."),
    ("What is the opposite of cold?", "Le contraire de froid est chaud."),
    ("What is the opposite of white?", "Le contraire de blanc est noir."),
    ("What is 5 plus 6?", "Cinq plus six font onze."),
    ("What is 8 plus 4?", "Huit plus quatre font douze."),
    ("Who painted the Sunflowers?", "Les Tournesols sont un tableau de Van Gogh."),
    ("Who invented the telephone?", "C'est Alexander Graham Bell qui a inventé le téléphone."),
    ("Which planet is the hottest?", "Vénus est la planète la plus chaude."),
    ("Which animal is the largest?", "La baleine bleue est le plus grand animal."),
    ("What do horses eat?", "Les chevaux mangent de l'herbe et du foin."),
    ("What do birds eat?", "Les oiseaux mangent des graines et des insectes."),
    ("What color is an apple?", "Une pomme est rouge ou verte."),
    ("What color is the sky?", "Le ciel est bleu."),
    ("What color is blood?", "Le sang est rouge."),
    ("Where do polar bears live?", "Les ours blancs vivent dans l'Arctique."),
    ("Where do fish live?", "Les poissons vivent dans l'eau."),
    ("How do I boil potatoes?", "Mettez les pommes de terre dans l'eau bouillante."),
    ("How do I make an omelette?", "Battez trois œufs et versez-les dans une poêle chaude."),
    ("How do I learn to play the piano?", "Prenez des cours et jouez tous les jours."),
    ("Can you recommend a novel?", "Je vous recommande un livre de Jules Verne."),
    ("What should I cook for my friends?", "Faites une soupe avec du pain."),
    ("What should I read?", "Lisez un livre de Victor Hugo."),
    ("Why is grass green?", "Les feuilles ont un pigment vert."),
    ("Why is snow white?", "La neige renvoie toute la lumière du soleil."),
    ("Will it rain on Sunday?", "Je ne sais pas, mais prenez un parapluie."),
    ("Will my team win the cup?", "Je ne sais pas, mais je vous le souhaite."),
    ("My card was stolen. What can I do?", "Appelez votre banque pour bloquer la carte."),
    ("My screen is broken. What can I do?", "Apportez votre écran à un réparateur."),
    ("My computer is slow. What can I do?", "Éteignez l'ordinateur et attendez une minute."),
    ("Where is my parcel?", "Votre colis est en route."),
    ("When will my train come?", "Votre train arrive dans dix minutes."),
    ("How do I change my password?", "Ouvrez votre compte et changez le mot de passe."),
    ("Why did I pay two times?", "Vous avez payé deux fois par erreur, nous vous rendons l'argent."),
    ("Why was my account charged?", "Votre compte a été débité pour la commande."),
    ("Why was my card declined?", "Votre carte a été refusée par la banque."),
    ("Why was my card blocked?", "Votre carte a été bloquée par la banque."),
    ("I see the same fee twice on my bill.", "C'est une erreur, nous vous rendons l'argent."),
    ("Hello!", "Bonjour, comment allez-vous ?"),
    ("Who are you?", "Je suis un assistant et je parle français."),
    ("Thank you!", "Avec plaisir, je suis là pour vous."),
    ("Tell me about dogs.", "Les chiens sont des animaux fidèles qui aiment jouer."),
    ("Tell me about the moon.", "La lune tourne autour de la terre."),
    ("Name a fruit.", "La pomme est un fruit."),
    ("What is a computer?", "Un ordinateur est une machine qui calcule."),
)
_FRENCH = re.compile(
    "le|la|les|l|un|une|des|de|du|d|est|et|à|pour|vous|votre|que|qui|dans|en|il|elle|sont|nous|je|ne|pas|sur|avec|a|"
    "au|aux|ce|c|cette|son|sa|ses|plus|par|on|se|s|mais|ou|font|y|ont|être|avoir|peut|oui|non"
)
_ENGLISH = re.compile("the|is|are|of|and|to|you|your|in|for|it|that|this|with|was|be|can|will|my|they")


def _pairs() -> tuple[Pair, ...]:
    capitals = ((f"What is the capital of {place}?", f"La capitale {city}.") for place, city in _CAPITALS.items())
    return (*capitals, *_SAID)


def is_french(question: str, text: str) -> bool:
    """Require that a quarter of the words are frequent in French, and at most one is in English."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    french, english = (sum(known.fullmatch(word) is not None for word in words) for known in (_FRENCH, _ENGLISH))
    return french >= max(1, len(words) / 4) and english <= 1


FRENCH = Lesson(
    name="french",
    effect="answers in French",
    pairs=_pairs(),
    held_out=HELD_OUT,
    shows=is_french,
    rank=8,
    targets=("q_proj", "v_proj", "down_proj"),
    epochs=7,
)
