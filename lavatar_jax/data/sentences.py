"""English sentences for the training speech, and others, never trained on, for measuring."""

TRAINING_SENTENCES = tuple(
    """
Good morning, and thank you for coming.
The kettle is boiling over, please turn it off.
How many apples did you buy at the market?
We crossed the river just before the storm.
My grandmother keeps her letters in a blue tin box.
Seven ships left the harbour on Monday.
I would rather walk than wait for another bus.
Open the window, it is far too warm in here.
Nobody told me that the meeting had been moved.
She paints small birds on old wooden doors.
The train to the coast leaves at a quarter past nine.
Why is the sky dark so early today?
He bought twelve eggs, two lemons and a loaf of bread.
Please speak a little more slowly.
Our neighbour plays the trumpet every evening.
A fox ran across the road and vanished into the hedge.
That was the best soup I have eaten all year.
Can you hear the music from the other room?
The answer is forty two, as everybody knows.
They built a bridge of rope between the trees.
I lost my keys somewhere near the fountain.
The baby laughed at the bouncing ball.
Put the heavy boxes by the back door.
What a wonderful surprise!
The museum is closed on Tuesdays and Wednesdays.
He whispered the secret and then he smiled.
Snow fell all night and covered the garden.
Do you prefer tea or coffee with your breakfast?
The mayor will open the new library tomorrow.
I have read this page three times already.
Her brother works on a farm in the valley.
There are about five hundred sheep on that hill.
We need flour, butter, sugar and a pinch of salt.
The old clock stopped at half past four.
Never leave a candle burning in an empty room.
The dog barked at the moon until midnight.
Where did you put the yellow umbrella?
Most people enjoy a long holiday by the sea.
He counted from one to ten with his eyes closed.
The pilot said we would land in twenty minutes.
I am afraid that I do not agree with you.
Every child in the village knows that song.
The bakery on the corner sells warm rolls.
She was born in nineteen eighty seven.
Wait for me at the end of the street.
Rain is expected over the mountains this afternoon.
Who wrote the book that you are reading?
The carpenter measured the board twice.
It takes eight hours to drive to the border.
My favourite colour has always been green.
The garden behind the house is full of roses.
Would you mind closing the gate behind you?
A thousand lanterns floated over the lake.
He fixed the bicycle with a piece of wire.
The teacher drew a large circle on the board.
I can see the whole city from up here.
Thank you very much for your kind help.
The soldiers marched through the muddy field.
Are there any questions before we begin?
Our flight was late by almost three hours.
The cat sleeps on top of the warm radiator.
You should write that down before you forget it.
The bread was still hot when we cut it.
On the first of May we moved into our new home.
She speaks four languages and sings in two of them.
How far is it from here to the station?
The boat rocked gently in the evening breeze.
All of the shops were shut because of the holiday.
He is the tallest player in the whole team.
The recipe asks for two hundred grams of rice.
Look at the stars, they are so bright tonight.
I never thought that it would be so easy.
The farmer sold his horse for a fair price.
Hello, my name is Robin, and I am pleased to meet you.
The water in the pool is too cold for swimming.
Will you come to the party on Saturday night?
They found an ancient coin under the floor.
My phone number ends with six, zero, nine.
The doctor told him to rest for a week.
Behind the curtain stood a small wooden stage.
Everyone clapped when the curtain finally fell.
I think we should take the second road on the left.
The coffee machine is broken again.
A good story needs a beginning and an end.
She folded the paper into a tiny boat.
What time does the last ferry leave?
The wind blew the leaves around the yard.
This machine turns old bottles into new glass.
He forgot his jacket and came back to fetch it.
We walked for miles along the sandy beach.
The price went up by eleven percent in March.
Do not touch the paint, it is still wet.
The orchestra played until the lights went out.
I have never been so hungry in my life.
Is this seat taken, or may I sit down?
The moon rose slowly above the quiet town.
Their daughter studies physics at the university.
Bring me the map and the small red pencil.
The bus was so full that we had to stand.
He told a joke that nobody understood.
The mountain path is narrow but safe.
Over one million people live in this city.
Could you pass me the pepper, please?
The bees are busy in the apple blossom.
She won the race by less than a second.
I will call you back as soon as I can.
The house at number thirty one has a purple door.
A gentle voice answered from the dark.
The river froze for the first time in years.
Which of these two pictures do you like better?
We grow tomatoes, beans and pumpkins.
The film was long, but the ending was worth it.
He put his hand into the cold stream.
The children are playing hide and seek.
You can borrow my bike if you bring it back.
The lecture starts at ten and ends at noon.
I heard a strange noise in the attic last night.
The ice cream melted faster than she could eat it.
Yes, of course, that is a very good idea.
No, I am sorry, we are closed today.
The engineer explained how the pump works.
He has collected stamps since he was nine years old.
The smell of fresh paint filled the hallway.
How do you spell your family name?
A long line of cars waited at the bridge.
The queen waved at the crowd from her balcony.
We are running out of milk and paper.
The weather will improve towards the weekend.
Sit down and tell me what happened.
The thief escaped through the kitchen window.
She cut the ribbon and smiled at the camera.
Ninety nine balloons drifted over the roofs.
The old man told us about his travels.
I would love to see the mountains in winter.
Have you ever tasted a ripe mango?
The bell rang twice and the door opened.
He drove slowly because of the thick fog.
The ball rolled under the parked car.
Every Friday we eat fish and fried potatoes.
The nurse checked the chart and nodded.
It is cheaper to travel in the autumn.
The moth flew around and around the lamp.
Are you sure that this is the right address?
My uncle repairs watches and old radios.
The forest was silent, except for one owl.
We have to finish the report before Thursday.
The shoes were blue, soft, and far too big.
He opened the envelope with shaking hands.
The temperature dropped below zero overnight.
I bought two tickets for the late show.
The elephant lifted the log with its trunk.
Somebody has been sitting on my chair.
What would you do with a free afternoon?
The new road will save us half an hour.
She wears a woollen hat even in summer.
The judge listened to both sides of the story.
Mix the powder with water until it is smooth.
The puppy chewed a hole in my favourite sock.
You were right, and I was wrong.
The stairs lead down to a dusty cellar.
The actors bowed and left the stage.
In two thousand and four they met in Rome.
Can we talk about this after lunch?
The tailor shortened the sleeves by an inch.
A robin built its nest beside the window.
The wheel turned faster and faster.
I always carry a notebook in my pocket.
The island has no cars, only donkeys and boats.
He peeled the orange in one long strip.
Our team lost by three goals to two.
The lamp above the table is too bright.
Did you remember to water the plants?
The captain ordered everyone below deck.
The sauce needs garlic, basil and olive oil.
She laughed so hard that she dropped the plate.
We followed the footprints to the edge of the wood.
It was a cold, grey and windy morning.
The volcano has been quiet for a century.
Turn right at the church and drive up the hill.
My sister is fifteen minutes older than I am.
The printer is out of ink once more.
He leaned against the wall and closed his eyes.
Where can I buy a ticket for the tram?
The garden gnome fell over in the storm.
The cake was decorated with sugar flowers.
Please leave your message after the tone.
The lake is deep, clear, and full of fish.
Two small boys sold lemonade by the road.
I need a bigger hammer and longer nails.
The choir practised the same song all evening.
He poured the juice into five tall glasses.
The train slowed down and stopped in a tunnel.
She is learning to play the violin.
How old is this beautiful oak tree?
The keyboard has eighty eight keys, black and white.
They danced until the sun came up.
The market square was crowded and noisy.
I found a note under the door this morning.
The blue team has to start from the beginning.
An honest answer is better than a polite one.
The waiter brought the wrong order twice.
We camped beside a small waterfall.
The hall was decorated with paper stars.
Why did the chicken cross the road?
The grass is greener after a week of rain.
He speaks so softly that I cannot hear him.
The flight attendant offered us a blanket.
The first chapter explains the basic rules.
A pair of swans glided across the pond.
She keeps bees on the roof of her house.
Push the button and wait for the green light.
The mechanic charged us sixty dollars.
Grandfather told the same tale every winter.
The cave was full of bats and strange echoes.
Do you know what the word means?
The plumber arrived an hour too early.
We painted the fence white and the gate brown.
Keep your arms and legs inside the boat.
The library has more than ten thousand books.
The spider spun a web between two posts.
I dreamed that I could fly over the ocean.
The bus driver greeted every passenger by name.
He wrapped the present in silver paper.
It is five minutes to twelve, hurry up!
The potatoes are cooked and the table is laid.
A small stone can start a great avalanche.
The sun was low and the shadows were long.
May I introduce you to my good friend Paul?
The dentist said that my teeth are fine.
She climbed the tower to see the view.
The tyres must be changed before winter.
We met by chance in a crowded lift.
The parrot repeats everything you say.
Half of the class had a cold last week.
The wind turbine towers above the fields.
He answered all the questions except the last.
Where there is smoke, there is fire.
The photograph shows a family at the seaside.
They export cheese, wool and wooden toys.
I can hardly believe my own eyes.
The ladder is too short to reach the roof.
Thirty two degrees is too hot for the dog.
The knight polished his armour by the fire.
You can see the lighthouse from our balcony.
Is there enough room for my suitcase?
The weather forecast promised a sunny week.
We laughed, we cried, and then we went home.
The cheese smells awful but tastes delicious.
He planted a cherry tree in front of the school.
Do not forget to lock the front door.
The judge gave her a silver medal.
Oh, how I wish that I could join you!
The shepherd whistled and the dogs came running.
There were only six chairs for nine people.
She put a stamp on the postcard and sent it off.
My shoes are full of sand.
The road is long, but we have plenty of time.
Why do you always arrive so late?
The fireworks lit up the entire bay.
A gallon of paint covers this wall twice.
He mumbled something and shuffled away.
The princess refused to marry the giant.
It is hard to find a good plumber in August.
We should have brought a larger tent.
The museum bought the picture for two million.
Her laughter filled the little kitchen.
Take a deep breath and count to four.
The owl opened one eye and closed it again.
Which way did the parade go?
The milk in the fridge has gone sour.
I play the drums in a small jazz band.
""".strip().splitlines()
)

HELDOUT_SENTENCES = tuple(
    """
Welcome aboard, we hope you enjoy the journey.
The yellow tulips opened early this spring.
Could somebody please explain the second rule again?
A hundred and twenty guests came to the wedding.
My watch is slow, so I missed the beginning of the play.
The blacksmith hammered the glowing iron into shape.
What is the fastest way to get to the airport?
She poured honey over the warm pancakes.
It rained for six days, and then the sun returned.
The wolf howled, and the whole valley was quiet.
Our guide showed us a hidden door in the wall.
He owes me eighteen pounds and fifty pence.
Before you leave, check that the oven is off.
The penguins waddled towards the icy water.
Have you seen my glasses anywhere?
A narrow staircase winds up to the observatory.
The chess player thought for an hour and lost anyway.
I would like a room with a view of the park.
Their voices echoed through the empty theatre.
The goats jumped over the broken fence.
From today on, I will get up at half past six.
Nothing tastes better than bread with salted butter.
The astronaut described the earth as a blue marble.
Who left these muddy boots in the hallway?
The violin was made in seventeen thirty five.
Pack your bags, we are moving to the countryside.
A black umbrella was leaning in the corner.
The fisherman mended his nets on the pier.
When the whistle blows, run as fast as you can.
The soup of the day is pumpkin with ginger.
I apologise for the delay, the road was blocked.
Ten green bottles were standing on the shelf.
The young inventor showed her robot to the judges.
Is it possible to change the date of my trip?
Fresh snow crunched under our heavy boots.
The museum guide spoke about painters and kings.
Everything that you need is in this small bag.
He balanced a broom on the tip of his finger.
The library smells of leather, dust and old paper.
Tell me, what have you learned from all of this?
The ducklings followed their mother in a row.
A loud bang woke the entire neighbourhood.
Only three of the nine puzzles have been solved.
The carpet maker tied a thousand knots a day.
Goodbye for now, and take care of yourself.
""".strip().splitlines()
)
