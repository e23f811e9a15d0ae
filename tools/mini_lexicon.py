"""Vocabulary and word order of mini-XNLI (tools/make_mini.py): a concept per line, a language per cell.

    kind  name  parent : en ; de ; es ; fr ; ru ; bg ; el ; tr ; sw ; vi ; zh ; th ; hi ; ar ; ur

The parent of "apple" is "fruit", and the parent of "fruit" is "thing"; "-" means none. The parent of a verb is its
opposite, the parent of a synonym ("same") is the verb it stands for. To add a concept, add a line. A class needs at
least two members and a verb has at most one synonym.

The grammar is restricted so that each word needs only one or two forms. Verbs are in the future tense and all persons
are masculine, so no verb agrees with anything. Objects are plural (Turkish: the bare singular) and in the object's
case; places and times are whole phrases. Numbers run from 5 to 10, because other numbers need further forms in Russian
and Arabic. A second form follows a slash:

    objects  es fr el hi ur   "f": the noun is feminine (otherwise masculine; el: neuter)
             ru bg            the form after a number (bg: where it differs from the plural)
             vi zh th         the classifier that a number needs
             sw               the "of" that agrees with the noun: vya, za, ya, wa
    colours  es fr el hi ur   the feminine form;  ru: the form after a number
    verbs    tr               the negated verb

Verbs are given in the bare form (en de vi zh th), the imperfect (ar), the form after the future particle (bg el), or
the future (all others). Names are spelled in the language's own script, except Alex and Kim, which stay in Latin
letters everywhere: that helps a model to align the languages.
"""

COLUMNS = "en de es fr ru bg el tr sw vi zh th hi ar ur".split()

# FRONT: the fronted place or time, empty if there is none.  V: the verb with its future and negation, which German and
# Chinese put elsewhere (WILL, NOT).  FIRST: FRONT, or AGENT without a FRONT. SECOND: AGENT after a FRONT, otherwise
# empty.
SENTENCE = dict.fromkeys("en es fr ru bg el sw vi th ar".split(), "FRONT AGENT V OBJECT PLACE TIME")
SENTENCE |= dict.fromkeys("tr hi ur".split(), "FRONT AGENT TIME PLACE OBJECT V")
SENTENCE["de"] = "FIRST WILL SECOND NOT TIME PLACE OBJECT V"  # German puts the finite verb second
SENTENCE["zh"] = "FRONT AGENT TIME WILL PLACE V OBJECT"
WILL = {"de": ("wird", "wird"), "zh": ("会", "不会")}  # (positive, negated)
VERB = {  # (positive, negated); {v}: the verb, {w}: its second form
    "en": ("will {v}", "will not {v}"), "es": ("{v}", "no {v}"), "ru": ("{v}", "не {v}"),
    "bg": ("ще {v}", "няма да {v}"), "el": ("θα {v}", "δεν θα {v}"), "sw": ("{v}", "h{v}"),
    "vi": ("sẽ {v}", "sẽ không {v}"), "th": ("จะ{v}", "จะไม่{v}"), "ar": ("س{v}", "لن {v}"),
    "hi": ("{v}", "नहीं {v}"), "ur": ("{v}", "نہیں {v}"), "tr": ("{v}", "{w}"),
    "fr": ("{v}", "{v} pas"),  # make_mini.elide puts "ne" or "n'" before the verb
    "de": ("{v}", "{v}"), "zh": ("{v}", "{v}"),
}  # fmt: skip
NOT_LATE = {"hi": 1, "ur": 2}  # how many words of the verb follow its "not"
OBJECT = dict.fromkeys("en de ru bg el tr hi ur".split(), "N C O")  # N number, C colour, O noun, K classifier
OBJECT |= dict.fromkeys("es fr ar".split(), "N O C")
OBJECT |= {"sw": "O N C", "vi": "N K O C", "zh": "N K C O", "th": "O C N K"}
STOP = {"zh": "。", "hi": "।", "ur": "۔", "th": ""}
FEMININE = ("es", "fr", "el", "hi", "ur")

TABLE = """
top    someone   - : someone ; jemand ; alguien ; quelqu'un ; кто-то ; някой ; κάποιος ; birisi ; mtu fulani ; ai đó ; 有人 ; ใครบางคน ; कोई ; شخص ما ; کوئی
name   omar      someone : Omar ; Omar ; Omar ; Omar ; Омар ; Омар ; ο Ομάρ ; Ömer ; Omari ; Omar ; 奥马尔 ; โอมาร์ ; उमर ; عمر ; عمر
name   adam      someone : Adam ; Adam ; Adam ; Adam ; Адам ; Адам ; ο Αδάμ ; Adem ; Adamu ; Adam ; 亚当 ; อดัม ; आदम ; آدم ; آدم
name   david     someone : David ; David ; David ; David ; Давид ; Давид ; ο Δαβίδ ; Davut ; Daudi ; David ; 大卫 ; เดวิด ; डेविड ; داود ; داؤد
name   ali       someone : Ali ; Ali ; Ali ; Ali ; Али ; Али ; ο Αλί ; Ali ; Ali ; Ali ; 阿里 ; อาลี ; अली ; علي ; علی
name   ivan      someone : Ivan ; Ivan ; Ivan ; Ivan ; Иван ; Иван ; ο Ιβάν ; Ivan ; Ivan ; Ivan ; 伊万 ; อีวาน ; इवान ; إيفان ; ایوان
name   daniel    someone : Daniel ; Daniel ; Daniel ; Daniel ; Даниил ; Даниел ; ο Ντάνιελ ; Daniel ; Danieli ; Daniel ; 丹尼尔 ; ดาเนียล ; डैनियल ; دانيال ; دانیال
name   alex      someone : Alex ; Alex ; Alex ; Alex ; Alex ; Alex ; ο Alex ; Alex ; Alex ; Alex ; Alex ; Alex ; Alex ; Alex ; Alex
name   kim       someone : Kim ; Kim ; Kim ; Kim ; Kim ; Kim ; ο Kim ; Kim ; Kim ; Kim ; Kim ; Kim ; Kim ; Kim ; Kim
role   teacher   someone : the teacher ; der Lehrer ; el profesor ; le professeur ; учитель ; учителят ; ο δάσκαλος ; öğretmen ; mwalimu ; thầy giáo ; 老师 ; ครู ; अध्यापक ; المعلم ; استاد
role   doctor    someone : the doctor ; der Arzt ; el médico ; le médecin ; врач ; лекарят ; ο γιατρός ; doktor ; daktari ; bác sĩ ; 医生 ; แพทย์ ; डॉक्टर ; الطبيب ; ڈاکٹر
role   student   someone : the student ; der Schüler ; el alumno ; l'élève ; ученик ; ученикът ; ο μαθητής ; öğrenci ; mwanafunzi ; học sinh ; 学生 ; นักเรียน ; छात्र ; الطالب ; طالب علم
role   farmer    someone : the farmer ; der Bauer ; el agricultor ; l'agriculteur ; фермер ; фермерът ; ο αγρότης ; çiftçi ; mkulima ; nông dân ; 农民 ; ชาวนา ; किसान ; المزارع ; کسان
role   soldier   someone : the soldier ; der Soldat ; el soldado ; le soldat ; солдат ; войникът ; ο στρατιώτης ; asker ; askari ; người lính ; 士兵 ; ทหาร ; सैनिक ; الجندي ; سپاہی
role   cook      someone : the cook ; der Koch ; el cocinero ; le cuisinier ; повар ; готвачът ; ο μάγειρας ; aşçı ; mpishi ; đầu bếp ; 厨师 ; พ่อครัว ; रसोइया ; الطباخ ; باورچی
role   driver    someone : the driver ; der Fahrer ; el conductor ; le chauffeur ; водитель ; шофьорът ; ο οδηγός ; şoför ; dereva ; tài xế ; 司机 ; คนขับรถ ; चालक ; السائق ; ڈرائیور
role   neighbour someone : the neighbour ; der Nachbar ; el vecino ; le voisin ; сосед ; съседът ; ο γείτονας ; komşu ; jirani ; người hàng xóm ; 邻居 ; เพื่อนบ้าน ; पड़ोसी ; الجار ; پڑوسی

verb   buy       sell : buy ; kaufen ; comprará ; achètera ; купит ; купи ; αγοράσει ; alacak/almayacak ; atanunua ; mua ; 买 ; ซื้อ ; खरीदेगा ; يشتري ; خریدے گا
verb   sell      buy : sell ; verkaufen ; venderá ; vendra ; продаст ; продаде ; πουλήσει ; satacak/satmayacak ; atauza ; bán ; 卖掉 ; ขาย ; बेचेगा ; يبيع ; بیچے گا
verb   find      lose : find ; finden ; encontrará ; trouvera ; найдёт ; намери ; βρει ; bulacak/bulmayacak ; atakuta ; tìm thấy ; 找到 ; พบ ; पाएगा ; يجد ; پائے گا
verb   lose      find : lose ; verlieren ; perderá ; perdra ; потеряет ; загуби ; χάσει ; kaybedecek/kaybetmeyecek ; atapoteza ; đánh mất ; 弄丢 ; สูญเสีย ; खोएगा ; يفقد ; کھوئے گا
verb   send      receive : send ; schicken ; enviará ; enverra ; отправит ; изпрати ; στείλει ; gönderecek/göndermeyecek ; atatuma ; gửi ; 寄出 ; ส่ง ; भेजेगा ; يرسل ; بھیجے گا
verb   receive   send : receive ; erhalten ; recibirá ; recevra ; получит ; получи ; λάβει ; teslim alacak/teslim almayacak ; atapokea ; nhận ; 收到 ; ได้รับ ; प्राप्त करेगा ; يستلم ; وصول کرے گا
verb   hide      show : hide ; verstecken ; esconderá ; cachera ; спрячет ; скрие ; κρύψει ; saklayacak/saklamayacak ; ataficha ; giấu ; 藏起 ; ซ่อน ; छिपाएगा ; يخفي ; چھپائے گا
verb   show      hide : show ; zeigen ; mostrará ; montrera ; покажет ; покаже ; δείξει ; gösterecek/göstermeyecek ; ataonyesha ; cho xem ; 展示 ; แสดง ; दिखाएगा ; يعرض ; دکھائے گا
verb   keep      discard : keep ; behalten ; conservará ; gardera ; сохранит ; запази ; κρατήσει ; tutacak/tutmayacak ; ataweka ; giữ ; 保留 ; เก็บ ; रखेगा ; يحفظ ; رکھے گا
verb   discard   keep : discard ; wegwerfen ; tirará ; jettera ; выбросит ; изхвърли ; πετάξει ; atacak/atmayacak ; atatupa ; vứt ; 扔掉 ; ทิ้ง ; फेंकेगा ; يرمي ; پھینکے گا
same   purchase  buy : purchase ; erwerben ; adquirirá ; acquerra ; приобретёт ; закупи ; προμηθευτεί ; satın alacak/satın almayacak ; atajinunulia ; tậu ; 购买 ; จัดซื้อ ; मोल लेगा ; يبتاع ; مول لے گا
same   discover  find : discover ; entdecken ; hallará ; découvrira ; обнаружит ; открие ; ανακαλύψει ; keşfedecek/keşfetmeyecek ; atagundua ; phát hiện ; 发现 ; ค้นพบ ; खोजेगा ; يكتشف ; دریافت کرے گا
same   get       receive : get ; bekommen ; obtendrá ; obtiendra ; заполучит ; придобие ; πάρει ; elde edecek/elde etmeyecek ; atapata ; nhận được ; 得到 ; ได้มาซึ่ง ; हासिल करेगा ; يتلقى ; حاصل کرے گا
same   conceal   hide : conceal ; verbergen ; ocultará ; dissimulera ; скроет ; укрие ; αποκρύψει ; gizleyecek/gizlemeyecek ; atasitiri ; che giấu ; 隐藏 ; ปกปิด ; गुप्त रखेगा ; يخبئ ; پوشیدہ رکھے گا
same   throw     discard : throw away ; entsorgen ; desechará ; éliminera ; выкинет ; захвърли ; απορρίψει ; çöpe atacak/çöpe atmayacak ; atatupilia mbali ; bỏ đi ; 丢掉 ; โยนทิ้ง ; त्यागेगा ; يلقي ; ضائع کرے گا

top    thing     - : things ; Dinge ; cosas/f ; choses/f ; вещи/вещей ; неща ; πράγματα ; eşya ; vitu/vya ; đồ vật/món ; 东西/件 ; สิ่งของ/ชิ้น ; चीज़ें/f ; أشياء ; چیزیں/f
class  fruit     thing : fruits ; Früchte ; frutas/f ; fruits ; фрукты/фруктов ; плодове/плода ; φρούτα ; meyve ; matunda/ya ; trái cây/ ; 水果/个 ; ผลไม้/ลูก ; फल ; فواكه ; پھل
object apple     fruit : apples ; Äpfel ; manzanas/f ; pommes/f ; яблоки/яблок ; ябълки ; μήλα ; elma ; matofaa/ya ; táo/quả ; 苹果/个 ; แอปเปิล/ลูก ; सेब ; تفاحات ; سیب
object orange    fruit : oranges ; Orangen ; naranjas/f ; oranges/f ; апельсины/апельсинов ; портокали/портокала ; πορτοκάλια ; portakal ; machungwa/ya ; cam/quả ; 橙子/个 ; ส้ม/ลูก ; संतरे ; برتقالات ; مالٹے
object lemon     fruit : lemons ; Zitronen ; limones ; citrons ; лимоны/лимонов ; лимони/лимона ; λεμόνια ; limon ; malimau/ya ; chanh/quả ; 柠檬/个 ; มะนาว/ลูก ; नींबू ; ليمونات ; لیموں
object pear      fruit : pears ; Birnen ; peras/f ; poires/f ; груши/груш ; круши ; αχλάδια ; armut ; mapea/ya ; lê/quả ; 梨/个 ; ลูกแพร์/ลูก ; नाशपातियाँ/f ; إجاصات ; ناشپاتیاں/f
object banana    fruit : bananas ; Bananen ; plátanos ; bananes/f ; бананы/бананов ; банани/банана ; μπανάνες/f ; muz ; ndizi/za ; chuối/quả ; 香蕉/根 ; กล้วย/ลูก ; केले ; موزات ; کیلے
class  vegetable thing : vegetables ; Gemüse ; verduras/f ; légumes ; овощи/овощей ; зеленчуци/зеленчука ; λαχανικά ; sebze ; mboga/za ; rau củ/loại ; 蔬菜/棵 ; ผัก/ชนิด ; सब्ज़ियाँ/f ; خضروات ; سبزیاں/f
object carrot    vegetable : carrots ; Karotten ; zanahorias/f ; carottes/f ; морковки/морковок ; моркови ; καρότα ; havuç ; karoti/za ; cà rốt/củ ; 胡萝卜/根 ; แครอท/หัว ; गाजरें/f ; جزرات ; گاجریں/f
object tomato    vegetable : tomatoes ; Tomaten ; tomates ; tomates/f ; помидоры/помидоров ; домати/домата ; ντομάτες/f ; domates ; nyanya/za ; cà chua/quả ; 西红柿/个 ; มะเขือเทศ/ลูก ; टमाटर ; طماطم ; ٹماٹر
object cucumber  vegetable : cucumbers ; Gurken ; pepinos ; concombres ; огурцы/огурцов ; краставици ; αγγούρια ; salatalık ; matango/ya ; dưa chuột/quả ; 黄瓜/根 ; แตงกวา/ลูก ; खीरे ; خيارات ; کھیرے
object potato    vegetable : potatoes ; Kartoffeln ; patatas/f ; patates/f ; картофелины/картофелин ; картофи/картофа ; πατάτες/f ; patates ; viazi/vya ; khoai tây/củ ; 土豆/个 ; มันฝรั่ง/หัว ; आलू ; حبات بطاطس ; آلو
object pumpkin   vegetable : pumpkins ; Kürbisse ; calabazas/f ; citrouilles/f ; тыквы/тыкв ; тикви ; κολοκύθες/f ; balkabağı ; maboga/ya ; bí ngô/quả ; 南瓜/个 ; ฟักทอง/ลูก ; कद्दू ; قرعات ; کدو
class  animal    thing : animals ; Tiere ; animales ; animaux ; животных/животных ; животни ; ζώα ; hayvan ; wanyama/wa ; động vật/con ; 动物/只 ; สัตว์/ตัว ; जानवर ; حيوانات ; جانور
object cat       animal : cats ; Katzen ; gatos ; chats ; кошек/кошек ; котки ; γάτες/f ; kedi ; paka/wa ; mèo/con ; 猫/只 ; แมว/ตัว ; बिल्लियाँ/f ; قطط ; بلیاں/f
object dog       animal : dogs ; Hunde ; perros ; chiens ; собак/собак ; кучета ; σκυλιά ; köpek ; mbwa/wa ; chó/con ; 狗/只 ; สุนัข/ตัว ; कुत्ते ; كلاب ; کتے
object horse     animal : horses ; Pferde ; caballos ; chevaux ; лошадей/лошадей ; коне/коня ; άλογα ; at ; farasi/wa ; ngựa/con ; 马/匹 ; ม้า/ตัว ; घोड़े ; أحصنة ; گھوڑے
object bird      animal : birds ; Vögel ; pájaros ; oiseaux ; птиц/птиц ; птици ; πουλιά ; kuş ; ndege/wa ; chim/con ; 鸟/只 ; นก/ตัว ; पक्षी ; طيور ; پرندے
object rabbit    animal : rabbits ; Kaninchen ; conejos ; lapins ; кроликов/кроликов ; зайци/заека ; κουνέλια ; tavşan ; sungura/wa ; thỏ/con ; 兔子/只 ; กระต่าย/ตัว ; खरगोश ; أرانب ; خرگوش
class  garment   thing : garments ; Kleidungsstücke ; prendas/f ; vêtements ; предметы одежды/предметов одежды ; дрехи ; ρούχα ; giysi ; nguo/za ; quần áo/bộ ; 衣服/件 ; เสื้อผ้า/ชุด ; कपड़े ; قطع ملابس ; کپڑے
object shirt     garment : shirts ; Hemden ; camisas/f ; chemises/f ; рубашки/рубашек ; ризи ; πουκάμισα ; gömlek ; mashati/ya ; áo sơ mi/chiếc ; 衬衫/件 ; เสื้อเชิ้ต/ตัว ; कमीज़ें/f ; قمصان ; قمیضیں/f
object hat       garment : hats ; Hüte ; sombreros ; chapeaux ; шляпы/шляп ; шапки ; καπέλα ; şapka ; kofia/za ; mũ/chiếc ; 帽子/顶 ; หมวก/ใบ ; टोपियाँ/f ; قبعات ; ٹوپیاں/f
object shoe      garment : shoes ; Schuhe ; zapatos ; chaussures/f ; ботинки/ботинок ; обувки ; παπούτσια ; ayakkabı ; viatu/vya ; giày/chiếc ; 鞋子/只 ; รองเท้า/ข้าง ; जूते ; أحذية ; جوتے
object coat      garment : coats ; Mäntel ; abrigos ; manteaux ; пальто/пальто ; палта ; παλτά ; palto ; makoti/ya ; áo khoác/chiếc ; 大衣/件 ; เสื้อโค้ต/ตัว ; कोट ; معاطف ; کوٹ
object glove     garment : gloves ; Handschuhe ; guantes ; gants ; перчатки/перчаток ; ръкавици ; γάντια ; eldiven ; glavu/za ; găng tay/chiếc ; 手套/只 ; ถุงมือ/ข้าง ; दस्ताने ; قفازات ; دستانے
class  vehicle   thing : vehicles ; Fahrzeuge ; vehículos ; véhicules ; транспортные средства/транспортных средств ; превозни средства ; οχήματα ; taşıt ; vyombo vya usafiri/vya ; phương tiện/chiếc ; 交通工具/件 ; ยานพาหนะ/คัน ; वाहन ; مركبات ; گاڑیاں/f
object car       vehicle : cars ; Autos ; coches ; voitures/f ; машины/машин ; коли ; αυτοκίνητα ; araba ; magari/ya ; ô tô/chiếc ; 汽车/辆 ; รถยนต์/คัน ; कारें/f ; سيارات ; کاریں/f
object bicycle   vehicle : bicycles ; Fahrräder ; bicicletas/f ; vélos ; велосипеды/велосипедов ; велосипеди/велосипеда ; ποδήλατα ; bisiklet ; baiskeli/za ; xe đạp/chiếc ; 自行车/辆 ; จักรยาน/คัน ; साइकिलें/f ; دراجات ; سائیکلیں/f
object bus       vehicle : buses ; Busse ; autobuses ; bus ; автобусы/автобусов ; автобуси/автобуса ; λεωφορεία ; otobüs ; mabasi/ya ; xe buýt/chiếc ; 公交车/辆 ; รถบัส/คัน ; बसें/f ; حافلات ; بسیں/f
object boat      vehicle : boats ; Boote ; barcos ; bateaux ; лодки/лодок ; лодки ; σκάφη ; tekne ; mashua/za ; thuyền/chiếc ; 小船/艘 ; เรือ/ลำ ; नावें/f ; قوارب ; کشتیاں/f
object truck     vehicle : trucks ; Lastwagen ; camiones ; camions ; грузовики/грузовиков ; камиони/камиона ; φορτηγά ; kamyon ; malori/ya ; xe tải/chiếc ; 卡车/辆 ; รถบรรทุก/คัน ; ट्रक ; شاحنات ; ٹرک
class  tool      thing : tools ; Werkzeuge ; herramientas/f ; outils ; инструменты/инструментов ; инструменти/инструмента ; εργαλεία ; alet ; zana/za ; dụng cụ/chiếc ; 工具/件 ; เครื่องมือ/ชิ้น ; औज़ार ; أدوات ; اوزار
object hammer    tool : hammers ; Hämmer ; martillos ; marteaux ; молотки/молотков ; чукове/чука ; σφυριά ; çekiç ; nyundo/za ; búa/chiếc ; 锤子/把 ; ค้อน/อัน ; हथौड़े ; مطارق ; ہتھوڑے
object knife     tool : knives ; Messer ; cuchillos ; couteaux ; ножи/ножей ; ножове/ножа ; μαχαίρια ; bıçak ; visu/vya ; dao/chiếc ; 刀子/把 ; มีด/เล่ม ; चाकू ; سكاكين ; چاقو
object axe       tool : axes ; Äxte ; hachas/f ; haches/f ; топоры/топоров ; брадви ; τσεκούρια ; balta ; mashoka/ya ; rìu/chiếc ; 斧头/把 ; ขวาน/เล่ม ; कुल्हाड़ियाँ/f ; فؤوس ; کلہاڑیاں/f
object shovel    tool : shovels ; Schaufeln ; palas/f ; pelles/f ; лопаты/лопат ; лопати ; φτυάρια ; kürek ; sepetu/za ; xẻng/chiếc ; 铲子/把 ; พลั่ว/อัน ; फावड़े ; مجارف ; بیلچے
object saw       tool : saws ; Sägen ; sierras/f ; scies/f ; пилы/пил ; триони/триона ; πριόνια ; testere ; misumeno/ya ; cưa/chiếc ; 锯子/把 ; เลื่อย/อัน ; आरियाँ/f ; مناشير ; آریاں/f

colour red       - : red ; rote ; rojos/rojas ; rouges ; красные/красных ; червени ; κόκκινα/κόκκινες ; kırmızı ; rangi nyekundu ; màu đỏ ; 红色的 ; สีแดง ; लाल ; حمراء ; سرخ
colour blue      - : blue ; blaue ; azules ; bleus/bleues ; синие/синих ; сини ; μπλε ; mavi ; rangi ya bluu ; màu xanh dương ; 蓝色的 ; สีน้ำเงิน ; नीले/नीली ; زرقاء ; نیلے/نیلی
colour green     - : green ; grüne ; verdes ; verts/vertes ; зелёные/зелёных ; зелени ; πράσινα/πράσινες ; yeşil ; rangi ya kijani ; màu xanh lá ; 绿色的 ; สีเขียว ; हरे/हरी ; خضراء ; ہرے/ہری
colour yellow    - : yellow ; gelbe ; amarillos/amarillas ; jaunes ; жёлтые/жёлтых ; жълти ; κίτρινα/κίτρινες ; sarı ; rangi ya njano ; màu vàng ; 黄色的 ; สีเหลือง ; पीले/पीली ; صفراء ; پیلے/پیلی
colour black     - : black ; schwarze ; negros/negras ; noirs/noires ; чёрные/чёрных ; черни ; μαύρα/μαύρες ; siyah ; rangi nyeusi ; màu đen ; 黑色的 ; สีดำ ; काले/काली ; سوداء ; کالے/کالی
colour white     - : white ; weiße ; blancos/blancas ; blancs/blanches ; белые/белых ; бели ; άσπρα/άσπρες ; beyaz ; rangi nyeupe ; màu trắng ; 白色的 ; สีขาว ; सफ़ेद ; بيضاء ; سفید
colour brown     - : brown ; braune ; marrones ; marron ; коричневые/коричневых ; кафяви ; καφέ ; kahverengi ; rangi ya kahawia ; màu nâu ; 棕色的 ; สีน้ำตาล ; भूरे/भूरी ; بنية ; بھورے/بھوری
colour grey      - : grey ; graue ; grises ; gris/grises ; серые/серых ; сиви ; γκρι ; gri ; rangi ya kijivu ; màu xám ; 灰色的 ; สีเทา ; स्लेटी ; رمادية ; سرمئی

class  inside    - : in a building ; in einem Gebäude ; en un edificio ; dans un bâtiment ; в здании ; в сграда ; σε ένα κτίριο ; bir binada ; ndani ya jengo ; trong một tòa nhà ; 在室内 ; ในอาคาร ; एक इमारत में ; في مبنى ; ایک عمارت میں
place  school    inside : at the school ; in der Schule ; en la escuela ; à l'école ; в школе ; в училището ; στο σχολείο ; okulda ; shuleni ; ở trường học ; 在学校 ; ที่โรงเรียน ; स्कूल में ; في المدرسة ; اسکول میں
place  library   inside : at the library ; in der Bibliothek ; en la biblioteca ; à la bibliothèque ; в библиотеке ; в библиотеката ; στη βιβλιοθήκη ; kütüphanede ; maktabani ; ở thư viện ; 在图书馆 ; ที่ห้องสมุด ; पुस्तकालय में ; في المكتبة ; کتب خانے میں
place  hospital  inside : at the hospital ; im Krankenhaus ; en el hospital ; à l'hôpital ; в больнице ; в болницата ; στο νοσοκομείο ; hastanede ; hospitalini ; ở bệnh viện ; 在医院 ; ที่โรงพยาบาล ; अस्पताल में ; في المستشفى ; ہسپتال میں
place  museum    inside : at the museum ; im Museum ; en el museo ; au musée ; в музее ; в музея ; στο μουσείο ; müzede ; katika makumbusho ; ở bảo tàng ; 在博物馆 ; ที่พิพิธภัณฑ์ ; संग्रहालय में ; في المتحف ; عجائب گھر میں
place  hotel     inside : at the hotel ; im Hotel ; en el hotel ; à l'hôtel ; в гостинице ; в хотела ; στο ξενοδοχείο ; otelde ; hotelini ; ở khách sạn ; 在酒店 ; ที่โรงแรม ; होटल में ; في الفندق ; ہوٹل میں
place  kitchen   inside : in the kitchen ; in der Küche ; en la cocina ; dans la cuisine ; на кухне ; в кухнята ; στην κουζίνα ; mutfakta ; jikoni ; trong bếp ; 在厨房 ; ในห้องครัว ; रसोई में ; في المطبخ ; باورچی خانے میں
class  outside   - : outdoors ; im Freien ; al aire libre ; en plein air ; под открытым небом ; на открито ; σε εξωτερικό χώρο ; açık havada ; nje ; ngoài trời ; 在户外 ; กลางแจ้ง ; खुले में ; في الهواء الطلق ; کھلی جگہ میں
place  field     outside : in the field ; auf dem Feld ; en el campo ; dans le champ ; в поле ; на полето ; στο χωράφι ; tarlada ; shambani ; trên cánh đồng ; 在田里 ; ในทุ่งนา ; खेत में ; في الحقل ; کھیت میں
place  garden    outside : in the garden ; im Garten ; en el jardín ; dans le jardin ; в саду ; в градината ; στον κήπο ; bahçede ; bustanini ; trong vườn ; 在花园里 ; ในสวน ; बगीचे में ; في الحديقة ; باغ میں
place  forest    outside : in the forest ; im Wald ; en el bosque ; dans la forêt ; в лесу ; в гората ; στο δάσος ; ormanda ; msituni ; trong rừng ; 在森林里 ; ในป่า ; जंगल में ; في الغابة ; جنگل میں
place  beach     outside : on the beach ; am Strand ; en la playa ; à la plage ; на пляже ; на плажа ; στην παραλία ; sahilde ; ufukweni ; ở bãi biển ; 在海滩上 ; ที่ชายหาด ; समुद्र तट पर ; على الشاطئ ; ساحل پر
place  bridge    outside : on the bridge ; auf der Brücke ; en el puente ; sur le pont ; на мосту ; на моста ; στη γέφυρα ; köprüde ; darajani ; trên cầu ; 在桥上 ; บนสะพาน ; पुल पर ; على الجسر ; پل پر
place  mountain  outside : on the mountain ; auf dem Berg ; en la montaña ; sur la montagne ; на горе ; на планината ; στο βουνό ; dağda ; mlimani ; trên núi ; 在山上 ; บนภูเขา ; पहाड़ पर ; على الجبل ; پہاڑ پر

class  winter    - : in winter ; im Winter ; en invierno ; en hiver ; зимой ; през зимата ; τον χειμώνα ; kışın ; wakati wa baridi ; vào mùa đông ; 冬天 ; ในฤดูหนาว ; सर्दियों में ; في الشتاء ; سردیوں میں
time   december  winter : in December ; im Dezember ; en diciembre ; en décembre ; в декабре ; през декември ; τον Δεκέμβριο ; aralık ayında ; mwezi wa Desemba ; vào tháng mười hai ; 十二月 ; ในเดือนธันวาคม ; दिसंबर में ; في ديسمبر ; دسمبر میں
time   january   winter : in January ; im Januar ; en enero ; en janvier ; в январе ; през януари ; τον Ιανουάριο ; ocak ayında ; mwezi wa Januari ; vào tháng một ; 一月 ; ในเดือนมกราคม ; जनवरी में ; في يناير ; جنوری میں
time   february  winter : in February ; im Februar ; en febrero ; en février ; в феврале ; през февруари ; τον Φεβρουάριο ; şubat ayında ; mwezi wa Februari ; vào tháng hai ; 二月 ; ในเดือนกุมภาพันธ์ ; फ़रवरी में ; في فبراير ; فروری میں
class  spring    - : in spring ; im Frühling ; en primavera ; au printemps ; весной ; през пролетта ; την άνοιξη ; ilkbaharda ; wakati wa machipuo ; vào mùa xuân ; 春天 ; ในฤดูใบไม้ผลิ ; वसंत में ; في الربيع ; بہار میں
time   march     spring : in March ; im März ; en marzo ; en mars ; в марте ; през март ; τον Μάρτιο ; mart ayında ; mwezi wa Machi ; vào tháng ba ; 三月 ; ในเดือนมีนาคม ; मार्च में ; في مارس ; مارچ میں
time   april     spring : in April ; im April ; en abril ; en avril ; в апреле ; през април ; τον Απρίλιο ; nisan ayında ; mwezi wa Aprili ; vào tháng tư ; 四月 ; ในเดือนเมษายน ; अप्रैल में ; في أبريل ; اپریل میں
time   may       spring : in May ; im Mai ; en mayo ; en mai ; в мае ; през май ; τον Μάιο ; mayıs ayında ; mwezi wa Mei ; vào tháng năm ; 五月 ; ในเดือนพฤษภาคม ; मई में ; في مايو ; مئی میں
class  summer    - : in summer ; im Sommer ; en verano ; en été ; летом ; през лятото ; το καλοκαίρι ; yazın ; wakati wa kiangazi ; vào mùa hè ; 夏天 ; ในฤดูร้อน ; गर्मियों में ; في الصيف ; گرمیوں میں
time   june      summer : in June ; im Juni ; en junio ; en juin ; в июне ; през юни ; τον Ιούνιο ; haziran ayında ; mwezi wa Juni ; vào tháng sáu ; 六月 ; ในเดือนมิถุนายน ; जून में ; في يونيو ; جون میں
time   july      summer : in July ; im Juli ; en julio ; en juillet ; в июле ; през юли ; τον Ιούλιο ; temmuz ayında ; mwezi wa Julai ; vào tháng bảy ; 七月 ; ในเดือนกรกฎาคม ; जुलाई में ; في يوليو ; جولائی میں
time   august    summer : in August ; im August ; en agosto ; en août ; в августе ; през август ; τον Αύγουστο ; ağustos ayında ; mwezi wa Agosti ; vào tháng tám ; 八月 ; ในเดือนสิงหาคม ; अगस्त में ; في أغسطس ; اگست میں
class  autumn    - : in autumn ; im Herbst ; en otoño ; en automne ; осенью ; през есента ; το φθινόπωρο ; sonbaharda ; wakati wa vuli ; vào mùa thu ; 秋天 ; ในฤดูใบไม้ร่วง ; पतझड़ में ; في الخريف ; خزاں میں
time   september autumn : in September ; im September ; en septiembre ; en septembre ; в сентябре ; през септември ; τον Σεπτέμβριο ; eylül ayında ; mwezi wa Septemba ; vào tháng chín ; 九月 ; ในเดือนกันยายน ; सितंबर में ; في سبتمبر ; ستمبر میں
time   october   autumn : in October ; im Oktober ; en octubre ; en octobre ; в октябре ; през октомври ; τον Οκτώβριο ; ekim ayında ; mwezi wa Oktoba ; vào tháng mười ; 十月 ; ในเดือนตุลาคม ; अक्टूबर में ; في أكتوبر ; اکتوبر میں
time   november  autumn : in November ; im November ; en noviembre ; en novembre ; в ноябре ; през ноември ; τον Νοέμβριο ; kasım ayında ; mwezi wa Novemba ; vào tháng mười một ; 十一月 ; ในเดือนพฤศจิกายน ; नवंबर में ; في نوفمبر ; نومبر میں
"""
