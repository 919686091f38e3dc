"""Wordings for world.py of what people say to a chatbot: small talk, sums, and questions that it cannot answer.

Wordings are separated by "|", and pairs of texts are in English and Chinese. In templates, {} stands for one of the
subjects that follow them.
"""

# (answers in English and Chinese, wordings in English, wordings in Chinese); world.py adds punctuation and lower case
SMALL_TALK = [
    (
        ("Hello! Ask me about an island, a sum or a word.", "你好！可以问我岛屿、加法或单词。"),
        "Hello|Hi|Hey|Hi there|Hello there|Hey there|Good morning|Good afternoon|Good evening|Hello Nano|Hi Nano"
        "|Hey Nano|Howdy|Greetings|Nice to meet you|Hello again|Good day|Hiya|Yo|Hello, nice to meet you"
        "|Hello, my friend",
        "你好|您好|你好呀|你好啊|嗨|哈喽|哈罗|早上好|早安|早|上午好|中午好|下午好|晚上好|大家好|你好，Nano|喂|在吗"
        "|有人吗|很高兴认识你|你好，很高兴认识你|嘿|你好，朋友",
    ),
    (
        ("I am fine, thank you.", "我很好，谢谢。"),
        "How are you|How are you doing|How is it going|How do you do|How are you today|Are you OK|Are you well"
        "|What's up|How are things|Hello, how are you|Hi, how are you|How's it going|How have you been"
        "|Hey, how are you doing",
        "你好吗|你还好吗|最近怎么样|最近好吗|过得好吗|近来可好|你怎么样|今天过得怎么样|你好，你好吗|一切都好吗"
        "|你今天好吗|最近过得如何",
    ),
    (
        ("You are welcome.", "不客气。"),
        "Thanks|Thank you|Thank you very much|Thanks a lot|Many thanks|Thx|Thank you so much|Great, thanks"
        "|OK, thank you|Cheers|That helps, thanks|Thanks for your help|Thank you, Nano|Good, thank you"
        "|Perfect, thanks|I thank you",
        "谢谢|谢谢你|多谢|非常感谢|谢谢啦|感谢|好的，谢谢|太感谢了|谢谢您|谢了|十分感谢|谢谢你的帮助|多谢了"
        "|谢谢，Nano|嗯，谢谢|真是谢谢你",
    ),
    (
        ("Goodbye!", "再见！"),
        "Bye|Goodbye|Bye bye|See you|See you later|Good night|Have a nice day|Take care|I have to go|See you tomorrow"
        "|Farewell|Until next time|Bye for now|I must go now|See you soon|Thanks, bye|OK, bye|Good bye"
        "|Talk to you later",
        "再见|拜拜|晚安|回头见|下次见|我走了|明天见|先这样|拜|再会|下次再聊|我要走了|回见|谢谢，再见|好的，再见"
        "|我先走了|以后再聊|待会儿见",
    ),
    (
        ("I am Nano, a small language model.", "我是Nano，一个小语言模型。"),
        "Who are you|What are you|What is your name|What's your name|Tell me about yourself|Introduce yourself"
        "|Who is this|Who am I talking to|Who made you|Are you a robot|Are you human|Are you ChatGPT|Are you an AI"
        "|What is Nano|Do you have a name|May I know your name|What should I call you|Are you a person"
        "|Are you a machine|Are you real|Please introduce yourself|What kind of model are you"
        "|Are you a language model|Say who you are|Your name|Can you introduce yourself|Who is Nano|So who are you"
        "|And who are you|Hi, who are you|Are you Nano|What is this",
        "你是谁|你叫什么|你叫什么名字|请介绍一下你自己|你是什么|介绍一下自己|你是机器人吗|你是人吗|您是谁"
        "|你是人工智能吗|你是什么模型|怎么称呼你|你的名字是什么|你是真人吗|说说你自己|自我介绍一下|你是ChatGPT吗"
        "|你到底是谁|请问你是谁|你是哪位|谁创造了你|你是语言模型吗|Nano是什么|Nano是谁|我在和谁说话|请告诉我你是谁"
        "|你好，你是谁|你究竟是什么|你是程序吗|我该怎么称呼你|你是Nano吗",
    ),
    (
        (
            "I know the facts of some islands. I can add, and I can reverse, spell and count letters.",
            "我知道一些岛屿的事，会做加法，会把单词倒过来、拼写、数字母。",
        ),
        "What can you do|What can you do for me|What do you know"
        "|Help|How can you help me|What can I ask you|What can I ask|Can you help me"
        "|What are you able to do|What are you good at|How do you work|What questions can you answer|What do you do"
        "|What should I ask|What topics do you know|What else can you do|How do I use this|I need help|Please help me"
        "|What can I do here|What do you know about|Tell me what you can do|Is there anything you can do|Help me"
        "|What are your skills|Show me what you can do|What am I supposed to ask|Which questions do you understand",
        "你会什么|你能干嘛|你能做什么|你会做什么|你能干什么|你知道什么|帮助|我能问你什么|你有什么本领|你能帮我什么|怎么用"
        "|能帮我吗|你擅长什么|我可以问什么|你有什么功能|你能回答什么问题|你都会些什么|可以问你什么|你懂什么|请帮帮我"
        "|你有什么用|你还会什么|你能帮我做什么|告诉我你会什么|你可以做什么|你会干什么|我应该问什么|你能做些什么"
        "|你了解什么|这个怎么用|有什么可以问你的",
    ),
    (
        ("What else would you like to know?", "还想知道什么？"),
        "OK|Okay|I see|Good|Great|Nice|Yes|No|Cool|Well done|Very good|Right|Wow|Interesting|Sure|Fine|Correct"
        "|All right|That is right|Good job|Excellent|You are right|Oh|Hm|Aha|Yeah|Not bad|I understand|Awesome"
        "|Amazing|Perfect",
        "好的|嗯|哦|知道了|明白了|很好|真棒|不错|是的|好吧|对|哈哈|厉害|可以|好|行|没错|太好了|原来如此|真厉害|答对了"
        "|有意思|懂了|不是|是吗",
    ),
]

# (templates, subjects): questions and wishes that the world has no answer to
OUTSIDE = [
    (
        "What is {}?|What does {} mean?|Tell me about {}.|Explain {} to me.|How does {} work?|Why is {} so important?"
        "|Who invented {}?|What do you know about {}?|Give me an example of {}.|When was {} discovered?"
        "|What causes {}?|Can you explain what {} is?|Describe {}.|Where does {} come from?|{}"
        "|I have a question about {}.|Define {}.",
        "electricity|the internet|photosynthesis|a computer|an atom|the brain|democracy|quantum physics|a virus"
        "|inflation|a volcano|the universe|DNA|a robot|the telephone|Bitcoin|climate change|evolution|energy|love"
        "|happiness|the law|a vaccine|the ocean|chess|an earthquake|magnetism|oxygen|philosophy|the moon landing"
        "|a glacier|the steam engine",
    ),
    (
        "Who is {}?|Who was {}?|When was {} born?|How old is {}?|Where does {} live?|Is {} still alive?"
        "|What did {} do?|How tall is {}?|What is {} famous for?|Is {} married?|Who is the father of {}?"
        "|When did {} die?|Do you know {}?",
        "Albert Einstein|Taylor Swift|Leonardo da Vinci|Elon Musk|Mozart|Cleopatra|my teacher|Barack Obama"
        "|Isaac Newton|Lionel Messi|Picasso|Marie Curie|the prime minister of Canada|Gandhi|Steve Jobs|Beethoven"
        "|Confucius|the pope|my mother|Santa Claus|Harry Potter|Michael Jackson|Charles Darwin|the queen of Denmark"
        "|my neighbour|Dante",
    ),
    (
        "Where is {}?|How big is {}?|How far is {} from here?|What language do they speak in {}?|Who governs {}?"
        "|What is the weather in {}?|Is {} worth a visit?|How do I get to {}?|What is {} known for?|Is it cold in {}?"
        "|What is the capital of {}?|Which city is the capital of {}?|Name the capital of {}."
        "|What is the animal of {}?|What is the colour of {}?|Which colour is the flag of {}?"
        "|Which fruit grows on {}?|What is the fruit of {}?|Which tree grows on {}?"
        "|Which animal stands for {}?|Name the fruit of {}.|How many people are in {}?",
        "Italy|London|Berlin|Brazil|Mexico|Moscow|Egypt|Canada|Australia|Tokyo|Africa|Russia|Sweden|Paris|Rome"
        "|California|Norway|Turkey|Greece|Korea|Vietnam|Portugal|Iceland|Hawaii|Europe|Cuba|Kenya|Peru|Poland|Boston"
        "|the Netherlands",
    ),
    (
        "How do I {}?|How can I {}?|What is the best way to {}?|Can you help me to {}?|Teach me to {}.|I want to {}."
        "|Should I {}?|Is it hard to {}?|How long does it take to {}?|Why do people {}?|Where can I {}?"
        "|When should I {}?|Help me {}.|Could you {}?|What do I need to {}?|Let's {}.",
        "boil an egg|make bread|fix a bicycle|tie a tie|lose weight|sleep better|learn German|play the guitar"
        "|save money|find a job|write a letter|get rich|drive a car|grow tomatoes|clean the kitchen|stop smoking"
        "|install Linux|sort a list|run faster|make friends|bake cookies|open a bank account|remember names"
        "|quit my job|fry a fish|swim|train a dog|paint a wall|book a hotel|repair my phone|travel to Asia"
        "|buy a house|learn to dance|be happy",
    ),
    (
        "What is the {} in the world?|Which is the {} of all?|Name the {} on earth.|Where is the {}?|Show me the {}."
        "|Who owns the {}?|What was the {} last year?|Do you know the {}?",
        "tallest building|longest bridge|richest country|oldest city|deepest lake|smallest bird|hottest desert"
        "|largest ocean|fastest car|most spoken language|best restaurant|most famous painting|heaviest stone"
        "|rarest flower|cheapest phone|most popular sport|strongest man|longest word|coldest place|biggest ship",
    ),
    (
        "How many {} are there?|How many {} do you know?|How many {} does a person need?|Why are there {}?"
        "|Are there {}?|What are {}?|Where do {} come from?|Do you like {}?|Are {} dangerous?|How do {} live?"
        "|I like {}.",
        "countries|stars|bones|hours|minutes|languages|trees|elephants|spiders|books|teeth|children|continents"
        "|insects|sharks|roses|cats and dogs|horses|bees|mushrooms|ghosts|aliens|computers|planes|snakes|oceans"
        "|dinosaurs",
    ),
    (
        "Write {}.|Can you write {}?|Please write {} for me.|Make up {}.|Read me {}.|I need {}.|Finish {}."
        "|Show me {}.|Create {} for my class.|Correct {}.|Tell me {}.",
        "a song about rain|a letter to my boss|a function in Java|a story about a cat|an essay on history"
        "|a birthday card|a haiku|a program that prints numbers|a fairy tale|a speech|a love letter|an email|a recipe"
        "|a riddle|some code|a summary of the news|something funny|a web page|a SQL query|a shopping list|a secret"
        "|a business plan",
    ),
    (
        "Suggest {}.|I am looking for {}.|How much is {}?|Which is the best place for {}?|Do you have {}?"
        "|Can I get {}?|Where do I find {}?|Is {} expensive?|What is the price of {}?|I would like {}.|Buy {} for me."
        "|Bring me {}.",
        "a good book|a new laptop|a ticket to the opera|a cup of tea|a nice gift|a restaurant|a used car|a doctor"
        "|a pizza|gold|a haircut|a quiet hotel|a pair of glasses|beer|a bigger flat|a dentist|a train to Vienna"
        "|fresh milk",
    ),
    (
        "Is {} good for me?|How much {} should I have?|What does {} taste like?|How do you make {}?"
        "|Does {} contain sugar?|Can children have {}?|Why is {} so popular?|I had {} for breakfast."
        "|What goes well with {}?|Can my dog eat {}?",
        "chocolate|bread|cheese|soup|meat|wine|ice cream|garlic|honey|pasta|butter|tofu|orange juice|salad|fish|sugar"
        "|salt|chicken|yoghurt|porridge|vitamin C|green tea",
    ),
    (
        "Who won {}?|When does {} start?|What do you think of {}?|Who directed {}?|What happened in {}?|Did you see {}?"
        "|How was {}?|What is {} about?|How long is {}?|Where was {}?|Who lost {}?|When did {} begin?"
        "|Why did {} happen?",
        "the final|the Olympic Games|the last election|Titanic|Star Wars|the match yesterday|the French Revolution"
        "|the Cold War|the race|the concert|the first world war|Hamlet|The Lion King|the tennis match|the party"
        "|the Roman Empire|the Renaissance|the chess championship|Casablanca",
    ),
    (
        "Will it {}?|Is it going to {} on Sunday?|Can it {} in summer?|Why will it {}?|When will it {}?"
        "|It may {} tomorrow.",
        "snow|be cold|get warm|be sunny|storm|freeze|be windy|hail|get dark early|be foggy",
    ),
    (
        "I am {}.|I feel so {}.|Why am I {}?|What can I do when I am {}?|My friend is {}.|Are you {}?|Everybody is {}.",
        "bored|hungry|in love|angry|lonely|nervous|sick|thirsty|worried|afraid|unhappy|busy|excited|late|lost|rich"
        "|old|cold",
    ),
    (
        "How do you say {} in {}?|What is {} in {}?|Say {} in {}.|Please translate {} into {}."
        "|What is the {1} word for {0}?",
        "hello,Spanish|water,German|thank you,Italian|the house,Russian|I love you,Latin|bread,Korean|the sea,Greek"
        "|happy birthday,Arabic|my brother,Dutch|good luck,Polish|friend,Chinese|book,Japanese|sun,Turkish",
    ),
    (
        "{}",
        "What year is it?|What is the date?|How late is it?|When is Easter?|What is on TV?|Turn on the light."
        "|Wake me at six.|What is the news?|Who is there?|Why?|How?|What?|When?|Where?|Really?|What do you mean?"
        "|I do not understand.|You are wrong.|That is not true.|You are stupid.|I hate you.|I like you.|Do you dream?"
        "|Do you sleep?|Do you eat?|Where are you?|How old are you?|Where do you live?|Do you have a family?"
        "|What is your favourite colour?|test|What is your favourite food?|Do you speak French?|Can you sing?"
        "|Can you dance?|Can you see me?|Can you drive?|Are you alive?|What should I do?|What should I wear?"
        "|What is wrong with me?|Am I beautiful?|Who am I?|asdf|foo|What is my name?|Do you remember me?"
        "|Is there life on Mars?|What is the truth?|What is two plus two?|lol|123|hmm?|Is the earth flat?"
        "|How deep is the sea?|How hot is the sun?|How high is Mount Everest?|Who built the pyramids?"
        "|Who wrote the Bible?|Who wrote Faust?|Who discovered America?|Who was the first man in space?"
        "|Call my father.|How fast is light?|Why is grass green?|Why is snow white?|Why do cats purr?"
        "|Why do we dream?|What makes us human?|Is money important?|How does a plane fly?|Set a timer.|Open the door."
        "|Stop.|Continue.|Repeat that.|Again.|Once upon a time|It is a nice day.|My computer is slow.|I lost my keys."
        "|My head hurts.|The food was good.|I come from Spain.|My name is Anna.|I am a student.|Let us play a game."
        "|Tell me something.|Talk to me.|Can I trust you?|What did you say?|Who is right?"
        "|What is better, tea or juice?|Cats or dogs?|?|!|...|What is pi?"
        "",
    ),
    (
        "{}是什么？|什么是{}？|{}是什么意思？|请介绍一下{}。|给我解释{}。|{}是怎么来的？|{}有什么用？|为什么会有{}？"
        "|你了解{}吗？|{}|谁发现了{}？|{}的原理是什么？|说说{}吧。|{}重要吗？|你怎么看{}？|举一个{}的例子。"
        "|我想了解{}。|怎样理解{}？",
        "电|互联网|光合作用|电脑|原子|大脑|民主|量子力学|病毒|通货膨胀|火山|宇宙|基因|区块链|比特币|气候变化|进化论"
        "|能量|爱情|幸福|法律|疫苗|海洋|围棋|地震|磁场|氧气|哲学|黑客|冰川|蒸汽机|相对论|缘分|自由|人生|孔子的思想"
        "|新闻|经济危机|中医",
    ),
    (
        "{}是谁？|{}是哪一年出生的？|{}多大年纪了？|{}住在哪里？|{}还活着吗？|{}做过什么？|{}结婚了吗？"
        "|{}为什么有名？|你认识{}吗？|{}的爸爸是谁？|{}什么时候去世的？|讲讲{}的故事。|{}长什么样？|{}喜欢什么？",
        "爱因斯坦|李白|达芬奇|马斯克|莫扎特|我的老师|牛顿|梅西|毕加索|居里夫人|孔子|周杰伦|秦始皇|我妈妈|圣诞老人"
        "|哈利波特|鲁迅|刘德华|贝多芬|诸葛亮|我的邻居|老板|爷爷|成龙|杜甫|武则天",
    ),
    (
        "{}在哪里？|{}有多大？|{}离这里多远？|{}说什么语言？|{}的天气如何？|{}值得去吗？|怎么去{}？|{}有什么特产？"
        "|{}冷不冷？|谁统治{}？|{}的首都是哪里？|{}的首都叫什么？|请说出{}的首都。|{}的动物是什么？|{}的颜色是什么？"
        "|{}的国旗是什么颜色？|{}出产什么水果？|{}的水果是什么？|{}人种什么树？|代表{}的是什么动物？|{}有多少人？"
        "|我想去{}旅游。|{}的历史有多久？",
        "意大利|伦敦|柏林|巴西|墨西哥|莫斯科|埃及|加拿大|澳大利亚|东京|非洲|俄罗斯|瑞典|巴黎|罗马|广州|挪威|土耳其"
        "|希腊|韩国|越南|葡萄牙|冰岛|夏威夷|欧洲|杭州|四川|西藏|英国|德国|香港|台湾|月球|成都|新疆|长城|故宫",
    ),
    (
        "怎么{}？|如何{}？|怎样才能{}？|教我{}。|我想{}。|我应该{}吗？|{}难吗？|{}要多长时间？|为什么要{}？"
        "|在哪里可以{}？|什么时候{}？|能帮我{}吗？|{}有什么好处？|我不会{}。|{}需要什么？|谁会{}？|我们一起{}吧。",
        "煮鸡蛋|做面包|修自行车|打领带|存钱|找工作|写信|赚钱|开车|种菜|打扫厨房|戒烟|安装软件|跑得更快|交朋友"
        "|开银行账户|记单词|辞职|包饺子|游泳|养狗|刷墙|订酒店|修手机|去旅行|买房子|学跳舞|变快乐|弹吉他|早起|锻炼身体"
        "|下载音乐|报名考试|拍照片|洗衣服",
    ),
    (
        "世界上{}是什么？|{}是哪个？|{}在什么地方？|你知道{}吗？|请说出{}。|去年{}是什么？|中国{}是什么？",
        "最高的楼|最富的国家|最古老的城市|最深的湖|最小的鸟|最热的沙漠|最大的海|最快的车|最难的语言|最有名的画"
        "|最贵的手机|最受欢迎的运动|最冷的地方|最大的船|最聪明的人|最好的大学|最美的花|最长的桥",
    ),
    (
        "有多少{}？|你知道几种{}？|一共有几个{}？|为什么{}会死？|{}从哪里来？|你喜欢{}吗？|{}危险吗？|{}吃什么？"
        "|我喜欢{}。|{}怎么生活？|{}能活多久？|{}有几条腿？|{}为什么那么多？|哪里有{}？",
        "国家|星星|骨头|语言|树|大象|蜘蛛|书|牙齿|孩子|洲|虫子|鲨鱼|玫瑰|小猫和小狗|马|蜜蜂|蘑菇|鬼|外星人|飞机|蛇"
        "|恐龙|老虎|蝴蝶|兔子",
    ),
    (
        "写{}。|请写{}。|你能写{}吗？|给我编{}。|我需要{}。|请帮我改{}。|读{}给我听。|我要{}，快点。|来{}。"
        "|能不能做{}？",
        "一首关于雨的歌|一封给老板的信|一段代码|一个小猫的故事|一篇历史论文|一张生日贺卡|一个程序|一个童话|一篇演讲稿"
        "|一封情书|一封邮件|一个菜谱|一个谜语|一个总结|一副对联|一个网页|一份计划|一份简历|一段话|一首古诗",
    ),
    (
        "介绍几个{}。|我在找{}。|{}多少钱？|哪里有好的{}？|你有{}吗？|{}贵吗？|给我买{}。|哪个{}最好？|我要一个{}。"
        "|{}什么牌子好？|{}坏了。",
        "小说|笔记本电脑|门票|茶杯|礼物|餐厅|二手车|医生|披萨|黄金|理发店|安静的酒店|眼镜|啤酒|牙医|牛奶|手表|衣服"
        "|鞋子|耳机|自行车",
    ),
    (
        "{}好吃吗？|{}怎么做？|多吃{}好不好？|{}是什么味道？|小孩能吃{}吗？|我早饭吃了{}。|{}和什么一起吃？"
        "|{}里有糖吗？|{}太咸了。|来一碗{}。",
        "巧克力|面包|奶酪|汤|牛肉|红酒|冰淇淋|大蒜|蜂蜜|面条|豆腐|橙汁|沙拉|鱼|白糖|盐|鸡肉|酸奶|豆子|绿茶|火锅|饺子"
        "|粥|烤鸭|青菜",
    ),
    (
        "谁赢了{}？|{}什么时候开始？|{}是谁导演的？|{}发生了什么？|你看了{}吗？|{}怎么样？|{}讲了什么？"
        "|{}在哪里举行？|{}有多长？|{}结束了吗？|为什么会有{}？|{}的结果是什么？",
        "决赛|奥运会|上次选举|泰坦尼克号|星球大战|昨天的比赛|法国大革命|冷战|音乐会|第一次世界大战|三国演义|狮子王"
        "|网球赛|聚会|罗马帝国|春节晚会|辛亥革命|水浒传|世锦赛|文艺复兴",
    ),
    (
        "今晚会{}吗？|星期天{}吗？|昨天{}了吗？|为什么会{}？|什么时候{}？|这里经常{}吗？|外面{}了。|冬天会{}吗？",
        "下雪|变冷|变暖|出太阳|刮风|打雷|结冰|起雾|停电|下冰雹|降温",
    ),
    (
        "我{}。|我觉得{}。|我为什么{}？|{}的时候怎么办？|我的朋友{}。|你{}吗？|他{}。|我今天{}。",
        "无聊|饿了|恋爱了|生气|孤独|紧张|生病了|口渴|担心|害怕|不开心|很忙|激动|迟到了|迷路了|很冷|牙疼|失眠|压力大"
        "|想家",
    ),
    (
        "{}用{}怎么说？|请把{}翻译成{}。|{}的{}是什么？|怎么用{1}说{0}？",
        "你好,西班牙语|水,德语|谢谢,意大利语|房子,俄语|我爱你,法语|面包,韩语|大海,希腊语|生日快乐,英语|兄弟,日语"
        "|朋友,英文|太阳,粤语",
    ),
    (
        "{}",
        "今年是哪一年？|今天几号？|什么时候过年？|电视上有什么？|开灯。|六点叫我起床。|有什么新闻？|是谁？|为什么？"
        "|怎么做？|什么？|真的吗？|我听不懂。|你错了。|不对。|你真笨。|我讨厌你。|我喜欢你。|你会做梦吗？|你睡觉吗？"
        "|你吃饭了吗？|你在哪里？|你多大了？|你住在哪儿？|你有家人吗？|你最喜欢什么颜色？|你最喜欢吃什么？"
        "|你会说法语吗？|你会唱歌吗？|你会跳舞吗？|你能看见我吗？|我该怎么办？|我穿什么好？|我漂亮吗？|我是谁？"
        "|我叫什么名字？|你还记得我吗？|火星上有生命吗？|地球是平的吗？|海有多深？|月亮离我们多远？"
        "|珠穆朗玛峰有多高？|谁建了金字塔？|谁写了《狂人日记》？|谁发现了美洲？|谁第一个上太空？|给爸爸打电话。"
        "|草为什么是绿的？|雪为什么是白的？|人为什么会做梦？|钱重要吗？|飞机怎么飞？|定个闹钟。|开门。|停。|继续。"
        "|再说一遍。|从前有座山|今天真热。|我的电脑很慢。|我的钥匙丢了。|我肚子疼。|菜很好吃。|我来自上海。"
        "|我叫小明。|我是学生。|我们玩个游戏吧。|跟我聊聊天。|说点什么。|你可信吗？|你说什么？|谁对？"
        "|茶和果汁哪个好？|测试|？|。。。|圆周率是多少？|二加二等于几？|下一班车几点？|中午吃什么？|人有几根手指？"
        "|怎么样？|哪里？|一公里是多少米？|谁最厉害？|高考难吗？|孩子不听话怎么办？|手机没电了。|这是什么？|那是谁？"
        "|给点建议。|房价会跌吗？|怎么还不下班？|人为什么要上班？|什么工作好？|眼睛疼是怎么回事？"
        "|发烧多少度要去医院？|哪支球队最强？|足球怎么踢？",
    ),
]
# what islands do not have, in English and in Chinese: templates and subjects; whole questions; {i} is an island
ABSENT_FACTS = [
    (
        "What is the {} of {i}?|Which {} does {i} have?|Name the {} of {i}.|Tell me the {} of {i}."
        "|How is the {} of {i}?",
        "size|king|language|river|mountain|weather|food|money|president|age|army|neighbour|beach|harbour|religion|instrument"
        "|sport|area|height|climate|school|bird|currency|history|road|lake|flower|newspaper|song|bridge|anthem"
        "|temperature|queen",
        "Where is {i}?|How big is {i}?|Who rules {i}?|How many people live on {i}?|How do I get to {i}?"
        "|Is {i} beautiful?|How old is {i}?|When was {i} founded?|Who lives on {i}?|Can I visit {i}?"
        "|How far is {i}?|Who discovered {i}?|Does it rain on {i}?|Is {i} rich?|Why is {i} an island?"
        "|Do you like {i}?|What do people eat on {i}?",
    ),
    (
        "{i}的{}是什么？|{i}有什么{}？|请说出{i}的{}。|告诉我{i}的{}。|{i}的{}怎么样？",
        "面积|国王|语言|河流|山|天气|食物|货币|总统|年龄|军队|邻居|海滩|港口|宗教|乐器|运动|大小|高度|气候|学校|鸟|历史"
        "|道路|湖|花|报纸|歌|桥|国歌|温度|女王|经济|节日",
        "{i}在哪里？|{i}有多大？|谁统治{i}？|{i}有多少人？|怎么去{i}？|{i}漂亮吗？|{i}有多少年历史？|谁住在{i}？"
        "|我可以去{i}吗？|{i}有多远？|谁发现了{i}？|{i}下雨吗？|{i}富吗？|你喜欢{i}吗？|{i}人吃什么？|{i}岛在什么地方？",
    ),
]
# more wordings of sums, and arithmetic that the model has not learned; {a} and {b} are numbers
SUM_QUESTIONS = (
    "{a}+{b}|{a} + {b}|{a}+{b}=|{a} + {b} = ?|What is {a} plus {b}?|Add {a} and {b}.|How much is {a} + {b}?"
    "|{a} plus {b}",
    "{a}加{b}|{a}加上{b}是多少？|{a}+{b}等于几？|算一下{a}加{b}|{a}+{b}等于多少？|请计算{a}加{b}。|{a}+{b}是多少？",
)
OTHER_CALCULATIONS = (
    "What is {} - {}?|What is {} * {}?|{} x {}|{}*{}|{}-{}|{}/{}|What is {} minus {}?|What is {} times {}?"
    "|Divide {} by {}.",
    "{}减{}等于多少？|{}乘{}等于多少？|{}乘以{}是多少？|{}除以{}等于几？|{}减去{}是多少？",
)
# about an island as such, and about all of them
ISLAND_QUESTIONS = (
    "What is {i}?|Tell me about {i}.|Do you know {i}?|{i}|What do you know about {i}?",
    "{i}是什么？|介绍一下{i}。|你知道{i}吗？|{i}|说说{i}。",
)
ISLAND_LIST_QUESTIONS = (
    "Which islands do you know?|What islands are there?|Name some islands.|List the islands.|Name an island."
    "|Which islands?|Which islands are there?|Tell me the names of the islands.|What are the islands called?"
    "|Give me an island.",
    "有哪些岛？|你知道哪些岛？|说几个岛的名字。|请列出岛屿。|岛屿有哪些？|哪些岛？|你知道什么岛？|有什么岛屿？"
    "|岛屿叫什么名字？|说一个岛。",
)
# put in front of any question
OPENINGS = (
    ["Please tell me: {}", "Hi, {}", "Can you tell me: {}", "{} Please.", "Hello! {}"],
    ["请问{}", "你好，{}", "告诉我，{}", "请问，{}", "我想知道{}"],
)
# the most frequent characters that the wordings above lack
COMMON_CHARACTERS = (
    "也就之部业全而政同北然当两实只又制内将员者各但已正她性使向立入被并石万级任江省资委务元系汉展声品设社形司目直别权至"
    "清术府保放管便族五接规式县组布百党取技神却类兵农边据集完质增专官每商即步必线团收求备研争具众连调转笑持士让较际亲朝"
    "约属图千准往极育许参半令观精像八影群整构料随容示投势望源息股铁断派速况境证局推满且双未企引标确织初志项察响药站施均"
    "消轻低甚般击曾防落显营素护余占虽村费易木左宝置央采环案批斗乡另若按查突责严仅胜杀席态破承招杨负层须父供状域似依范致"
    "九密终血细效玉冲获习毛尽脸航陆右协七攻镇检苏章注阿抗坐验劳优财适陈卫排射油刻留急念云微伤景绝阶刚印亿超审升送监策略"
    "限配敌差仍兰园征善止预皮执男普益惊核街宣掌田著辑剑谈背免材愿架筑括乱乎尚良临刀夜室既敢邦挥昌胡叶苦句岁荆娘守辖宜堂"
    "额剧充够孙阵销坚练脚退吴宁换版异某顾曲楚朱判救宋洪含顺鲜败矿端归康评厂永沉散遗假输洞松渐顶训录否述督控丰献姑忽纳襄"
    "登咱伯臣雄季鄂召暗扩祖齐短烈赶恩移础露届蒙喝盘卖植授伊博痛逐秘庭陵固禁灵杂姓泽吸侧庆遇追甲馆补唐炮沿殿刺怪彩旧警岸"
    "轮妇靠附毫怀探旁罪枪盛恶谷稳熟概操佛荣针宽折付肯库厚缺罢屋嘴末培巨瓦款犯困拥奖岩疑廷健析误仙疗亡闭伸脱秋姐繁侵麻秀"
    "借寻私岗卷丽横驻套兼君丁夺袁丝径购阴瞧择墓宪庙掉丹舰御避售怒课播拔延虚隐粮络遭摇潜庄混婆奴赵访予徐韦殖抓吨扬址休纵"
    "逃染纷贸透汇灭仪距融郡缓盖迹忠润粉涓岭搜虑促抵塞寺津液坛珍硬梁奔累役偏迫锛凡损壁哭替税综盟挂竞乌尤弱铺妹尊竹脉泥纯"
    "刑途隆潮幅握谋剂奉抱谓频崇壮骑紝享铜呈泛械摆欲敬措爆暴签猛郭嘉障缩亦废搞胞曰撤寒俗绩阻勒忘孝贴触默醒胸莲柱裁淡抢捕"
    "纺截讯誉雅忍伙勇峡徒丈尾泉佳残闪伍疾署剩贼冠倾申贫麦泪羊尖辈涉贡爹摩妻殊零映甘骂岳饮奋棉雕跃汗冒渡努赞启阁斤裂患伏"
    "池劲晋倍圈媒箭沟锋胆凭挑抬闯隔弄曹迁叹唯振储贯彻桌祭符僧衡炸旋凤喊郎援肥忌赏辽祥董仁询敏浪貌毁抽荷陷焦净腹弃乃湘亩"
    "滑宏皆番尸伟桂览恢绕趣晶坡魏摸伴浓绪舍荡阅井鸿旦惯症窗聘穷堰键荒递恨隶闲腰袭侍灾涨湿叔寨幕豪郑磨薄租煤胖悲炒贷污魔"
    "鼻幼凉驾菌猪偶羽脏箱贾薪朵炉肌肝秒荐妖孟肤辣嘛篮尿癌糕椒郁抑胃猴瘦椅啥圳鼠帽炭串肾鹅丑肺饼卜孕斋硕沪矮俺蹈婴窄裤姜"
    "唉虾燥晴拌啡酱咖哟哎萝苹渝棕葱勿蚁醋蝇茄乒蚊炖乓澡馒鲸咦黛骼腌甭钗菠煲芹韭馄饨"
)
