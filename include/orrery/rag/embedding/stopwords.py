"""Words that say nothing of what a passage is about, by language: after Snowball's lists, lower-cased."""

from __future__ import annotations

from collections.abc import Mapping

_LISTS: Mapping[str, str] = {
    "english": """
        a about above after again against all am an and any are aren as at be because been before being below
        between both but by can cannot could couldn d did didn do does doesn doing don down during each few for
        from further had hadn has hasn have haven having he her here hers herself him himself his how i if in
        into is isn it its itself just ll m me might more most must mustn my myself no nor not now o of off on
        once only or other our ours ourselves out over own re s same shan she should shouldn so some such t than
        that the their theirs them themselves then there these they this those through to too under until up ve
        very was wasn we were weren what when where which while who whom why will with won would wouldn y you
        your yours yourself yourselves
    """,
    "german": """
        aber alle allem allen aller alles als also am an ander andere anderem anderen anderer anderes auch auf
        aus bei bin bis bist da damit dann das dass daß dein deine deinem deinen deiner dem den denn der derer
        des dessen dich die dies diese diesem diesen dieser dieses dir doch dort du durch ein eine einem einen
        einer eines einig einige einigem einigen einiger einiges einmal er es etwas euch euer eure eurem euren
        eurer für gegen gewesen hab habe haben hat hatte hatten hier hin hinter ich ihm ihn ihnen ihr ihre ihrem
        ihren ihrer im in indem ins ist jede jedem jeden jeder jedes jene jenem jenen jener jenes jetzt kann
        kein keine keinem keinen keiner können könnte man manche manchem manchen mancher mein meine meinem
        meinen meiner mich mir mit muss musste nach nicht nichts noch nun nur ob oder ohne sehr sein seine
        seinem seinen seiner selbst sich sie sind so solche solchem solchen solcher soll sollte sondern sonst um
        und uns unser unsere unserem unseren unter viel vom von vor war waren warst was weg weil weiter welche
        welchem welchen welcher wenn werde werden wie wieder will wir wird wirst wo wollen wollte während würde
        würden zu zum zur zwar zwischen über
    """,
    "french": """
        ai aie as au aux avait avec avez avoir avons c ce ceci cela celle celles celui ces cet cette ceux chez
        comme d dans de des dont du elle elles en es est et eu eux furent fut ici il ils j je l la le les leur
        leurs lui là m ma mais me mes moi mon même n ne nos notre nous on ont ou où par pas peut plus pour
        pourquoi qu quand que quel quelle quelles quels qui s sa sans se sera seront ses si soit sommes son sont
        suis sur t ta te tes toi ton tous tout toute toutes très tu un une vos votre vous y à étaient étais
        était étant été être
    """,
    "spanish": """
        a al algo algunas algunos ante antes aquel aquella aquellas aquellos aunque como con contra cual cuando
        de del desde donde dos el ella ellas ellos en entre era eran eres es esa esas ese eso esos esta estaba
        estado estas este esto estos está están fue fueron ha había han hasta hay la las le les lo los me mi mis
        mucho muy más mí nada ni no nos nosotros nuestra nuestras nuestro nuestros o os otra otras otro otros
        para pero poco por porque que quien quienes qué se sea ser si sido sin sobre son soy su sus sí también
        tanto te tengo ti tiene tienen todo todos tu tus tú un una unas uno unos usted y ya yo él
    """,
    "italian": """
        a abbia abbiamo ad agli ai al alla alle allo anche avere aveva c che chi ci coi col come con contro cui
        d da dagli dai dal dalla dalle dallo degli dei del della delle dello di dove e ed era erano essere fa
        fra fu furono gli ha hai hanno ho i il in io l la le lei li lo loro lui ma me mi mia mie miei mio ne
        negli nei nel nella nelle nello no noi non nostra nostre nostri nostro o ogni per perché però più poi
        quale quando quanta quanto quella quelle quelli quello questa queste questi questo se sei si sia siamo
        siete sono sta stata state stati stato su sua sue sugli sui sul sulla sulle sullo suo suoi te ti tra tu
        tua tue tuo tuoi tutti tutto un una uno vi voi vostra vostre vostri vostro è
    """,
    "portuguese": """
        a ao aos aquela aquelas aquele aqueles aquilo as até com como da das de dela delas dele deles depois do
        dos e ela elas ele eles em entre era eram essa essas esse esses esta estas estava este estes está estão
        eu foi foram há isso isto já lhe lhes mais mas me mesmo meu meus minha minhas muito na nas nem no nos
        nossa nossas nosso nossos num numa não nós o os ou para pela pelas pelo pelos por porque qual quando que
        quem se sem ser será seu seus sua suas são só também te tem tenho ter teu teus tinha tu tua tuas têm um
        uma umas uns você vocês vos à às é
    """,
    "dutch": """
        aan al alles als altijd andere ben bij daar dan dat de der deze die dit doch doen door dus een eens en
        er ge geen geweest haar had heb hebben heeft hem het hier hij hoe hun iemand iets ik in is ja je kan kon
        kunnen maar me meer men met mij mijn moet na naar niet niets nog nu of om omdat onder ons ook op over
        reeds te tegen toch toen tot u uit uw van veel voor want waren was wat we wel werd wezen wie wij wil
        worden wordt zal ze zelf zich zij zijn zo zonder zou
    """,
}
STOP_WORDS: Mapping[str, frozenset[str]] = {name: frozenset(words.split()) for name, words in _LISTS.items()}
